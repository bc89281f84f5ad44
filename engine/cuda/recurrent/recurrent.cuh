// What the kernels of recurrent layers share.
//
// States are rows of an array. A slot has a ring of `places` rows, slot * places and following: the state behind the token
// at a position is kept at place (position + offset of the slot) mod places. A token reads the place in front of its own and
// writes its own, so a step that is run again finds what it read before.

// Where the state behind `position` is kept.
DEVICE int place_of(int position, int offset, int places) {
    const int place = (position + offset) % places;
    return place < 0 ? place + places : place;
}

DEVICE float logistic(float x) { return 1.0f / __fadd_rn(1.0f, expf(-x)); }
DEVICE float silu(float x) { return x / __fadd_rn(1.0f, expf(-x)); }
DEVICE float gated(float y, float d, float x, float z) { return __fmul_rn(fmaf(d, x, y), silu(z)); }  // Mamba
DEVICE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// A decay of delta rules. floor: below zero the least logarithm of one, else 0 for none.
DEVICE float decay_of_step(float step, float rate, float floor) {
    return floor < 0.0f ? expf(__fmul_rn(floor, logistic(__fmul_rn(rate, step)))) : expf(__fmul_rn(rate, softplus(step)));
}

struct PromptSpan {  // engine/cuda/recurrent/rows.py span_table has the same columns
    int row, n_rows, n_past, read, write;  // read, write: rows of states
};

// ---- vectors that lanes share ----------------------------------------------------------------------------------
// LANES lanes hold a vector of SIZE floats, EACH of them in every lane: groups of four, neighbouring lanes hold neighbouring
// groups. Elements behind SIZE are zero.

constexpr int floats_of_a_lane(int size, int lanes) { return (size + 4 * lanes - 1) / (4 * lanes) * 4; }

// ALIGNED: p is aligned to 16 bytes, if SIZE is a multiple of four.
template <int SIZE, int LANES, int EACH, bool ALIGNED>
DEVICE void load_part(const float* p, int lane, float* to) {
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
        const int n = i * LANES + lane * 4;
        if constexpr (ALIGNED && SIZE % 4 == 0) {
            const float4 v = n < SIZE ? *(const float4*)(p + n) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k) to[i + k] = n + k < SIZE ? p[n + k] : 0.0f;
        }
    }
}

template <int SIZE, int LANES, int EACH>
DEVICE void store_part(float* p, int lane, const float* from) {
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
        const int n = i * LANES + lane * 4;
        if constexpr (SIZE % 4 == 0) {
            if (n < SIZE) *(float4*)(p + n) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (n + k < SIZE) p[n + k] = from[i + k];
        }
    }
}

template <int EACH>
DEVICE void clear_part(float* to) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) to[i] = 0.0f;
}

// Sum of a[i] * b[i].
template <int EACH>
DEVICE float sum_of_products(const float* a, const float* b) {
    float sums[EACH / 2];
#pragma unroll
    for (int i = 0; i < EACH / 2; ++i) sums[i] = fmaf(a[2 * i + 1], b[2 * i + 1], __fmul_rn(a[2 * i], b[2 * i]));
#pragma unroll
    for (int n = EACH / 2; n > 1; n = (n + 1) / 2)
#pragma unroll
        for (int i = 0; i < n / 2; ++i) sums[i] = __fadd_rn(sums[i], sums[i + (n + 1) / 2]);
    return sums[0];
}

// The same over the floats of all LANES lanes, in every one of them.
template <int LANES, int EACH>
DEVICE float dot_parts(const float* a, const float* b) {
    float sum = sum_of_products<EACH>(a, b);
#pragma unroll
    for (int offset = 1; offset < LANES; offset *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(FULL_MASK, sum, offset));
    return sum;
}

// ---- values of a head's memory ---------------------------------------------------------------------------------
// A memory has a row of SIZE floats for each of `values` values, and groups of LANES lanes have N of them: number `mine` of each
// `step` from `first` on. row: of value 0. Those behind the last value are zeros and are not written.

// Where it is not `kept`, it is zeros.
template <int SIZE, int LANES, int EACH, int N>
DEVICE void load_values(const float* memory, i64 row, int first, int step, int mine, int values, bool kept, int lane, float (&m)[N][EACH]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int value = first + n * step + mine;
        if (kept && value < values) {
            load_part<SIZE, LANES, EACH, true>(memory + (row + value) * SIZE, lane, m[n]);
        } else {
            clear_part<EACH>(m[n]);
        }
    }
}

template <int SIZE, int LANES, int EACH, int N>
DEVICE void store_values(float* memory, i64 row, int first, int step, int mine, int values, int lane, const float (&m)[N][EACH]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int value = first + n * step + mine;
        if (value < values) store_part<SIZE, LANES, EACH>(memory + (row + value) * SIZE, lane, m[n]);
    }
}

// Sum of what LANES lanes have left of a number.
template <int LANES, int COLUMNS>
DEVICE float sum_of_left(const float (&left)[LANES][COLUMNS], int column) {
    float sum = left[0][column];
#pragma unroll
    for (int lane = 1; lane < LANES; ++lane) sum = __fadd_rn(sum, left[lane][column]);
    return sum;
}
