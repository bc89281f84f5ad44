// Prompts of linear recurrences, CHUNK tokens at a time: what becomes of the memory from chunk to chunk.
//
// Of each head, a memory M of keys by values. With q, k, v and u of the chunk's tokens as rows, and what the kernel before has
// left of every token in its record (L and P are lower triangular, CHUNK x CHUNK):
//     x = beta * (v - of_k * (k . M));  x' = L x              DELTA; else x' = v
//     y = of_q * (q . M) + P x';  M = decay * M + u (x) (of_v * x')
// PAIRED (with DELTA and decays of keys), where x and v both enter the memory, each with keys of its own:
//     x' = L (k . M) + N v;  y = q . M + P x' + O v;  M = decay * M + u (x) x' + also (x) v
// Products are those of the tensor cores, of floats in two parts each (TF32), so that they are nearly as exact as float32.
//
// Chunks begin at multiples of CHUNK, and where a span does. A row's bits do not depend on the rows behind it: L and P are zero where
// they would count. So how a prompt is cut changes nothing, as long as pieces end at such positions or with the prompt.

constexpr int CHUNK = 16;   // tokens; rows.py has the same number
constexpr int RECORD = 40;  // floats of a token's record: its rows of L and P, then these
enum { OF_P = CHUNK, OF_BETA = 2 * CHUNK, OF_K, OF_Q, OF_V, OF_CHUNK };  // OF_CHUNK: the decay of the whole chunk
constexpr int PAIRED_RECORD = 64;  // the same with PAIRED: rows of L, P, N and O
enum { OF_N = 2 * CHUNK, OF_O = 3 * CHUNK };
constexpr int WALK_THREADS = 128;
constexpr int WALK_VALUES = 32;  // values of a block; plan.py has the same number

// Keys of a memory as the walk keeps them, and floats from row to row in shared memory: neighbouring rows begin 8 banks apart.
constexpr int walk_keys(int keys) { return (keys + 15) / 16 * 16; }
constexpr int walk_stride(int keys) { return (keys + 31) / 32 * 32 + 8; }

// Rows of the first chunk of what is left of a span.
DEVICE int chunk_rows(const PromptSpan& span, int first) {
    return min(CHUNK - (span.n_past + first) % CHUNK, span.n_rows - first);
}

// sums: N numbers (a power of two, at most WARP) of every lane; the sum over all lanes of number lane mod N.
template <int N>
DEVICE float sum_of_lanes(float* sums) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const bool upper = lane & offset;
#pragma unroll
        for (int i = 0; i < (offset < N ? offset : N); ++i) {
            const float given = offset < N && !upper ? sums[i + offset] : sums[i];
            const float kept = offset < N && upper ? sums[i + offset] : sums[i];
            sums[i] = __fadd_rn(kept, __shfl_xor_sync(FULL_MASK, given, offset));
        }
    }
    return sums[0];
}

// The first part of a float, which TF32 holds; what is missing is exact.
DEVICE float first_part(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

// A 16x8 or 8x8 operand in two parts.
template <int N>
struct Parts {
    float first[N], rest[N];
    __device__ __forceinline__ void set(int i, float x) {
        first[i] = first_part(x);
        rest[i] = x - first[i];
    }
};

// What a lane holds of a result (rows g and g + 8, columns 2t and 2t + 1) as the left operand of the next product, whose k are
// those columns: 2t is k t, and 2t + 1 is k t + 4. The right operand then has rows 2t and 2t + 1 there.
DEVICE Parts<4> left_operand(const float* d) {
    Parts<4> parts;
    parts.set(0, d[0]), parts.set(1, d[2]), parts.set(2, d[1]), parts.set(3, d[3]);
    return parts;
}

DEVICE Parts<2> right_operand(float low, float high) {
    Parts<2> parts;
    parts.set(0, low), parts.set(1, high);
    return parts;
}

DEVICE void multiply(float* d, const float* a, const float* b) { mma8(d, a[0], a[1], a[2], a[3], b[0], b[1]); }

// d[n] += a * b[n], small terms first; consecutive products belong to different sums.
template <int N>
DEVICE void add_products(float (*d)[4], const Parts<4>& a, const Parts<2>* b) {
#pragma unroll
    for (int n = 0; n < N; ++n) multiply(d[n], a.rest, b[n].first);
#pragma unroll
    for (int n = 0; n < N; ++n) multiply(d[n], a.first, b[n].rest);
#pragma unroll
    for (int n = 0; n < N; ++n) multiply(d[n], a.first, b[n].first);
}

// Rows of a batch: row r, column c at rows + r * stride + c.
struct Rows {
    const float* rows;
    i64 stride;
    __device__ __forceinline__ const float* at(i64 row) const { return rows + row * stride; }
};

// What a walk reads. All at the columns of the head: q, k, u (keys), v (values), record (RECORD), and with PER_KEY the decay of the
// whole chunk for every key in the row of its first token, else that of the record. k is not read with PER_KEY and without DELTA.
struct WalkInputs {
    Rows q, k, u, v, record, key_decays;
    Rows also;  // with PAIRED
};

template <int KEYS, bool DELTA, bool PER_KEY, bool PAIRED>
struct WalkMemory {
    static_assert(!PAIRED || (DELTA && PER_KEY), "the only form that is written");
    static constexpr int STRIDE = walk_stride(KEYS), WIDTH = PAIRED ? PAIRED_RECORD : RECORD;
    static constexpr bool OWN_U = PER_KEY;  // else u is k
    static constexpr bool HAS_K = DELTA || !OWN_U;
    float q[CHUNK][STRIDE], k[HAS_K ? 2 : 1][HAS_K ? CHUNK : 1][STRIDE], u[OWN_U ? CHUNK : 1][OWN_U ? STRIDE : 4];
    float also[PAIRED ? CHUNK : 1][PAIRED ? STRIDE : 4];
    float record[2][CHUNK][WIDTH];
    float key_decays[2][PER_KEY ? walk_keys(KEYS) : 4];
    float exchange[WALK_THREADS / WARP][DELTA ? 12 : 4][WARP];
};

// CHUNK rows of COLUMNS floats into shared memory, zeros behind row n.
template <int COLUMNS, int STRIDE>
DEVICE void copy_rows(float (*to)[STRIDE], const Rows& from, i64 row, int n) {
    constexpr int PIECES = COLUMNS / 4;
#pragma unroll
    for (int i = threadIdx.x; i < CHUNK * PIECES; i += WALK_THREADS) {
        const int t = i / PIECES, column = i % PIECES * 4;
        copy_async<16>(&to[t][column], from.at(row + min(t, n - 1)) + column, t < n);
    }
}

// One head's values first to first + WALK_VALUES - 1 of one span; KEYS is a multiple of 4. state_in (null for zero) and
// state_out: (VALUES values, KEYS keys) of the head. A pair of warps has 16 values, each half of the keys; memories stay in
// registers. finish(row, value, y, v, other): what becomes of a result; v as it was read, and what look_up(row, value) gave while
// the chunk's products were still to come.
template <int KEYS, int VALUES, bool DELTA, bool PER_KEY, bool PAIRED, class LookUp, class Finish>
DEVICE void walk_chunks(WalkMemory<KEYS, DELTA, PER_KEY, PAIRED>& memory, const WalkInputs& in, const float* state_in,
                        float* state_out, const PromptSpan& span, int first_value, LookUp look_up, Finish finish) {
    using Memory = WalkMemory<KEYS, DELTA, PER_KEY, PAIRED>;
    constexpr int BLOCKS = walk_keys(KEYS) / 16;  // of 8 keys, a warp's
    constexpr int STRIDE = Memory::STRIDE, WIDTH = Memory::WIDTH;
    constexpr bool HAS_K = Memory::HAS_K;
    static_assert(KEYS % 4 == 0, "rows are copied by 16 bytes");
    const int thread = threadIdx.x, warp = thread / WARP, half = warp % 2;
    const int g = thread % WARP / 4, t = thread % 4;
    const int first_key = half * BLOCKS * 8, value = first_value + warp / 2 * 16 + g;  // and value + 8
    for (int i = thread; i < CHUNK * (STRIDE - KEYS); i += WALK_THREADS) {
        const int row = i / (STRIDE - KEYS), column = KEYS + i % (STRIDE - KEYS);
        memory.q[row][column] = 0.0f;
        if constexpr (HAS_K) memory.k[0][row][column] = memory.k[1][row][column] = 0.0f;
        if constexpr (PER_KEY) memory.u[row][column] = 0.0f;
        if constexpr (PAIRED) memory.also[row][column] = 0.0f;
    }
    if constexpr (PER_KEY)
        for (int i = KEYS + thread; i < walk_keys(KEYS); i += WALK_THREADS) memory.key_decays[0][i] = memory.key_decays[1][i] = 0.0f;
    float m[BLOCKS][4];
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int key = first_key + block * 8 + 2 * t + i % 2, of = value + i / 2 * 8;
            m[block][i] = state_in && key < KEYS && of < VALUES ? state_in[of * KEYS + key] : 0.0f;
        }
    // v of a chunk as results lie over the lanes: tokens 2t and 2t + 1 of each half of the chunk.
    auto load_values = [&](int first, int n, float (*to)[4]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int token = i / 4 * 8 + 2 * t + i % 2, of = value + i / 2 % 2 * 8;
            to[i / 4][i % 4] = token < n && of < VALUES ? in.v.at(span.row + first + token)[of] : 0.0f;
        }
    };
    auto copy_keys = [&](int stage, int first, int n) {
        if constexpr (HAS_K) copy_rows<KEYS>(memory.k[stage], in.k, span.row + first, n);
        copy_rows<WIDTH>(memory.record[stage], in.record, span.row + first, n);
        if constexpr (PER_KEY)
            for (int i = 4 * thread; i < KEYS; i += 4 * WALK_THREADS)
                copy_async<16>(&memory.key_decays[stage][i], in.key_decays.at(span.row + first) + i, true);
        copy_commit();
    };
    float v[2][4], next_v[2][4];
    int n = chunk_rows(span, 0), stage = 0;
    copy_keys(0, 0, n);
    copy_rows<KEYS>(memory.q, in.q, span.row, n);
    copy_commit();
    load_values(0, n, next_v);
    for (int first = 0; first < span.n_rows; stage ^= 1) {
        const int next = first + n, n_next = next < span.n_rows ? chunk_rows(span, next) : 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i / 4][i % 4] = next_v[i / 4][i % 4];
        copy_wait<0>();
        __syncthreads();  // all threads see this chunk and have finished reading the previous one
        if constexpr (PER_KEY) {
            copy_rows<KEYS>(memory.u, in.u, span.row + first, n);
            if constexpr (PAIRED) copy_rows<KEYS>(memory.also, in.also, span.row + first, n);
            copy_commit();
        }
        if (n_next) {
            copy_keys(stage ^ 1, next, n_next);
            load_values(next, n_next, next_v);
        } else {
            copy_commit();  // as many groups as otherwise
        }
        float others[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = half * 8 + 2 * t + i % 2, of = value + i / 2 * 8;
            others[i] = token < n && of < VALUES ? look_up(span.row + first + token, of) : 0.0f;
        }
        const float(*const k)[STRIDE] = memory.k[HAS_K ? stage : 0];
        const float(*const record)[WIDTH] = memory.record[stage];
        // q . M, and k . M, of half of the keys: the halves of the chunk, of q and then of k.
        float sums[DELTA ? 4 : 2][4] = {};
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const Parts<4> a = left_operand(m[block]);
            Parts<2> b[DELTA ? 4 : 2];
#pragma unroll
            for (int i = 0; i < (DELTA ? 4 : 2); ++i) {
                const float* const from = (i < 2 ? memory.q : k)[i % 2 * 8 + g] + first_key + block * 8 + 2 * t;
                b[i] = right_operand(from[0], from[1]);
            }
            add_products<DELTA ? 4 : 2>(sums, a, b);
        }
        // A warp finishes the results of one half of the chunk, and gives the parts of the other; both need all of k . M.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            memory.exchange[warp][i][thread % WARP] = half ? sums[0][i] : sums[1][i];
            if constexpr (DELTA) {
                memory.exchange[warp][4 + i][thread % WARP] = sums[2][i];
                memory.exchange[warp][8 + i][thread % WARP] = sums[3][i];
            }
        }
        if constexpr (PER_KEY) copy_wait<1>();  // u is there
        __syncthreads();
        if (n_next) copy_rows<KEYS>(memory.q, in.q, span.row + next, n_next);
        copy_commit();
        float y[1][4], x[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = half * 8 + 2 * t + i % 2;
            const float sum = __fadd_rn(half ? sums[1][i] : sums[0][i], memory.exchange[warp ^ 1][i][thread % WARP]);
            y[0][i] = PAIRED ? sum : __fmul_rn(record[token][OF_Q], sum);
        }
        if constexpr (DELTA) {
            Parts<4> given[2], own[PAIRED ? 2 : 1];
            float changes[2][4] = {};
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                float of[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* const mine = record[part * 8 + 2 * t + i % 2];
                    const float known = __fadd_rn(sums[2 + part][i], memory.exchange[warp ^ 1][4 + part * 4 + i][thread % WARP]);
                    of[i] = PAIRED ? known : __fmul_rn(mine[OF_BETA], v[part][i] - __fmul_rn(mine[OF_K], known));
                }
                given[part] = left_operand(of);
                if constexpr (PAIRED) own[part] = left_operand(v[part]);
            }
#pragma unroll
            for (int part = 0; part < 2; ++part)
#pragma unroll
                for (int from = 0; from <= part; ++from) {
                    const float* const row = record[part * 8 + g] + from * 8 + 2 * t;
                    const Parts<2> b = right_operand(row[0], row[1]);
                    add_products<1>(&changes[part], given[from], &b);
                    if constexpr (PAIRED) {
                        const Parts<2> of_v = right_operand(row[OF_N], row[OF_N + 1]);
                        add_products<1>(&changes[part], own[from], &of_v);
                    }
                }
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i / 4][i % 4] = changes[i / 4][i % 4];
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i / 4][i % 4] = v[i / 4][i % 4];
        }
#pragma unroll
        for (int from = 0; from < 2; ++from) {
            if (from > half) continue;
            const Parts<4> a = left_operand(x[from]);
            const float* const row = record[half * 8 + g] + OF_P + from * 8 + 2 * t;
            const Parts<2> b = right_operand(row[0], row[1]);
            add_products<1>(y, a, &b);
            if constexpr (PAIRED) {
                const Parts<2> of_v = right_operand(row[OF_O - OF_P], row[OF_O - OF_P + 1]);
                add_products<1>(y, left_operand(v[from]), &of_v);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = half * 8 + 2 * t + i % 2, of = value + i / 2 * 8;
            if (token < n && of < VALUES) {
                const float of_v = half ? v[1][i] : v[0][i];
                finish(span.row + first + token, of, y[0][i], of_v, others[i]);
            }
        }
        Parts<4> brought[2], brought_too[PAIRED ? 2 : 1];
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            float of[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) of[i] = PAIRED ? x[part][i] : __fmul_rn(record[part * 8 + 2 * t + i % 2][OF_V], x[part][i]);
            brought[part] = left_operand(of);
            if constexpr (PAIRED) brought_too[part] = left_operand(v[part]);
        }
        const float decay = record[0][OF_CHUNK];  // not used with PER_KEY
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const int key = first_key + block * 8;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                m[block][i] = __fmul_rn(m[block][i], PER_KEY ? memory.key_decays[stage][key + 2 * t + i % 2] : decay);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const int token = part * 8 + 2 * t;
                const float low = PER_KEY ? memory.u[token][key + g] : k[token][key + g];
                const float high = PER_KEY ? memory.u[token + 1][key + g] : k[token + 1][key + g];
                const Parts<2> b = right_operand(low, high);
                add_products<1>(&m[block], brought[part], &b);
                if constexpr (PAIRED) {
                    const Parts<2> too = right_operand(memory.also[token][key + g], memory.also[token + 1][key + g]);
                    add_products<1>(&m[block], brought_too[part], &too);
                }
            }
        }
        first = next, n = n_next;
    }
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int key = first_key + block * 8 + 2 * t + i % 2, of = value + i / 2 * 8;
            if (key < KEYS && of < VALUES) state_out[of * KEYS + key] = m[block][i];
        }
}
