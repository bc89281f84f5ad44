// Quantized matrix times 1..64 sequences: weights are read once, unpacked to halves in registers, multiplied by tensor cores.
//
// Defines: RESIDENT; SEGMENTS matrices of FORMATS formats FORMAT0.. (FORMAT_OF per matrix); NT groups of 8 sequences; TILES of 16
// rows a block, a warp each; four of them are a unit (of a warp group, where wgmma multiplies: for more than WARP_PRODUCTS
// groups); FETCHERS threads beside them; STAGES of STAGE bytes of shared memory, EARLY of them fetched before the input; CLUSTER
// blocks share the columns of the same rows. LEAVES_HALVES: clusters have 128 outputs, see decode_gemm_halves.cuh. Activations:
// decode_gemm_operand.cu.
//
// One warp fetches: a stage is 256 columns of the activations and of every tile of the block. Order of an element's sum:
// blocks of a cluster have consecutive ranges of 256 columns; in a range one after the other, in 256 columns steps of 16 as
// the tensor cores add them (mma.sync and wgmma alike); then ranks 0..CLUSTER-1. Nothing depends on the number of sequences
// or on TILES.

constexpr int CONSUMERS = TILES * 32;
constexpr int KEPT_STRIDE = 68;  // floats of 64 rows of one sequence, so that lanes meet different banks
[[maybe_unused]] constexpr int FINISHED_STRIDE = 132;  // of 128 outputs, likewise

struct Segment {
    const u8* data;
    const float* scale;
    int first_unit, tiles, rows, column, format;
};

#define SEGMENT_PARAMETERS(n) \
    const u8 *data##n, const float *scale##n, int units##n, int tiles##n, int rows##n, int column##n,

// Whether every sequence's activations of these 256 columns are as they were, so that no factor undoes anything. Mostly.
DEVICE bool unscaled(const float* factors, int batch, int lane) {
    const int b = lane % (NT * 4) * 2;
    const float2 two = *(const float2*)(factors + b);
    return __all_sync(FULL_MASK, (two.x == 1.0f || b >= batch) && (two.y == 1.0f || b + 1 >= batch));
}

// acc += products of rows g and g + 8 times a factor of the row.
DEVICE void add_unscaled(Sums& acc, const Sums& products, float2 of_rows) {
#pragma unroll
    for (int i = 0; i < NT * 4; ++i) acc[i] = fmaf(products[i], i & 2 ? of_rows.y : of_rows.x, acc[i]);
}

// acc += products of rows g and g + 8 times a factor of the row and one of the sequence, a power of two: the same bits.
DEVICE void add_products(Sums& acc, const Sums& products, float2 of_rows, const float* factors, int lane) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
        const float2 of_columns = *(const float2*)(factors + j * 8 + (lane & 3) * 2);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            acc[j * 4 + i] = fmaf(products[j * 4 + i], (i & 2 ? of_rows.y : of_rows.x) * (i & 1 ? of_columns.y : of_columns.x),
                                  acc[j * 4 + i]);
    }
}

// acc += 256 columns (quads 128s of them) of this warp's tile times the activations at x, whose factors are per sequence.
template <class F>
DEVICE void add_columns(const u8* tile, u32 x, const float* factors, int batch, int quads, int lane, Sums& acc) {
    typedef HalfWeights<F> Half;
    auto load = [&](int s) {  // sub-block s of 8
        return Half::load(tile + (F::COLUMNS == 128 ? s / 4 * F::CHUNK_BYTES : 0), F::COLUMNS == 128 ? 0 : s / 4, s % 4, lane);
    };
    Sums products;
    u32 minimums[4];
    float2 of_minimums;
#if NT <= WARP_PRODUCTS
    x += lane * 16;
    if (Half::MINIMUMS) {
        of_minimums = Half::minimums(tile, lane, minimums);
#pragma unroll
        for (int i = 0; i < NT * 4; ++i) products[i] = 0.0f;
        add_step(products, minimums, x + SUMS_AT);
        add_products(acc, products, of_minimums, factors, lane);
    }
#pragma unroll
    for (int i = 0; i < NT * 4; ++i) products[i] = 0.0f;
#pragma unroll
    for (int s = 0; s < 8; ++s) {  // 32 columns
        if (s == 4 && F::COLUMNS == 128 && quads < 2) break;
        u32 f[8];
        Half::fragments(load(s), s % 4, f);
        add_two_steps(products, f, x + s * 2 * STEP_BYTES);
    }
    add_products(acc, products, Half::post(tile, lane >> 2), factors, lane);
#else
    const u64 operand = operand_at(x);
    const bool plain = unscaled(factors, batch, lane);
    auto add = [&](float2 of_rows) {
        if (plain)
            add_unscaled(acc, products, of_rows);
        else
            add_products(acc, products, of_rows, factors, lane);
    };
    if (Half::MINIMUMS) {
        of_minimums = Half::minimums(tile, lane, minimums);
        wgmma_fence();
        wgmma(products, minimums, operand + SUMS_AT / 16, 0);
        wgmma_commit();
    }
    u32 f[3][8];
    typename Half::Packed packed = load(0);
#pragma unroll
    for (int s = 0; s < 8; ++s) {  // 32 columns, unpacked while those before are multiplied
        if (s == 4 && F::COLUMNS == 128 && quads < 2) break;
        if (s >= 3) wgmma_wait<2>();
        Half::fragments(packed, s % 4, f[s % 3]);
        if (s < 7) {
            const typename Half::Packed before = packed;
            packed = load(s + 1);
            Half::keep_shared(packed, before, (s + 1) % 4);
        }
        keep_order(f[s % 3]);
        if (s == 0 && Half::MINIMUMS) {
            wgmma_wait<0>();
            keep_order(products);
            add(of_minimums);
            keep_order(acc);
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 2; ++i) wgmma(products, f[s % 3] + i * 4, operand + (s * 2 + i) * STEP_BYTES / 16, s + i > 0);
        wgmma_commit();
    }
    wgmma_wait<0>();
    keep_order(products);
    add(Half::post(tile, lane >> 2));
#endif
}

// out = f(alpha * (x W^T * factor + bias)) or out += ...; see batch_matvec.py for shapes.
// RESIDENT: every block converts x itself and keeps it; else operand is x converted before: [256 columns] of X_BYTES.
// groups: of TILES. emitted: where a cluster leaves its 256 outputs as a later product's operand as well, times
// the weight of that product's norm; with LEAVES_HALVES two clusters, without any weight. words: see there.
extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(CONSUMERS + FETCHERS, 1)
    batch_matvec(ALL_SEGMENTS int units, int groups, int columns, int batch, const float* x, int x_stride,
                 const float* norm, float eps, const u8* operand, const float* bias, float* out, int out_stride, int add, float alpha,
                 const float* emitted_norm, u8* emitted
#if LEAVES_HALVES
                 , int* words
#endif
    ) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int first_group = (int)blockIdx.x / CLUSTER, step = CLUSTER > 1 ? groups : (int)gridDim.x;
    const int chunks = (columns + 255) >> 8, begin = rank * chunks / CLUSTER, end = (rank + 1) * chunks / CLUSTER;
    // shared memory: RESIDENT activations | stages | barriers | sums of squares of this block's columns, per sequence
    u8* const ring = shared + (RESIDENT ? (chunks + CLUSTER - 1) / CLUSTER * X_BYTES : 0);
    const u32 stages = shared_address(ring), full = stages + STAGES * STAGE, empty = full + STAGES * 8;
    float* const squares = (float*)(ring + STAGES * (STAGE + 16));
    constexpr int WEIGHTS_AT = RESIDENT ? 0 : X_BYTES;
    auto segment_of = [&](int unit) {
        const u8* const data[SEGMENTS] = ALL_OF(data);
        const float* const scale[SEGMENTS] = ALL_OF(scale);
        const int ends[SEGMENTS] = ALL_OF(units), tiles[SEGMENTS] = ALL_OF(tiles), rows[SEGMENTS] = ALL_OF(rows);
        const int column[SEGMENTS] = ALL_OF(column);
        constexpr int format[SEGMENTS] = FORMAT_OF;
        Segment s = {data[0], scale[0], 0, tiles[0], rows[0], column[0], format[0]};
#pragma unroll
        for (int i = 1; i < SEGMENTS; ++i)
            if (unit >= ends[i - 1]) s = {data[i], scale[i], ends[i - 1], tiles[i], rows[i], column[i], format[i]};
        return s;
    };

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) barrier_init(full + i * 8, 1), barrier_init(empty + i * 8, TILES);
        publish_barriers();
    }
    __syncthreads();

    if (warp >= CONSUMERS / 32) {
        if (FETCHERS == 128) registers_fewer<32>();
        if (warp > CONSUMERS / 32) {  // here only because registers change hands by warp groups
#if CLUSTER > 1
            cluster_barrier();
            cluster_barrier();
#endif
            return;
        }
        // Lane l fetches tile l of the block, lane 0 also the activations.
        constexpr int chunk_bytes[SEGMENTS] = CHUNK_BYTES_OF, chunk_columns[SEGMENTS] = CHUNK_COLUMNS_OF;
        int stage = 0, count = 0;
        bool held = true;  // the first stages' activations, until they are there
        auto fetch_held = [&](int stages_held) {
            if (lane == 0)
                for (int i = 0; i < stages_held; ++i)
                    bulk_copy<false>(stages + i * STAGE, operand + (i64)(begin + i % (end - begin)) * X_BYTES, X_BYTES, full + i * 8);
        };
        u32 parity = 1;
        for (int group = first_group; group < groups; group += step) {
            const int unit = min((group * TILES + lane) >> 2, units - 1);
            const Segment m = segment_of(unit);
            const int ends[SEGMENTS] = ALL_OF(units);
            int bytes = chunk_bytes[0], wide = chunk_columns[0];
#pragma unroll
            for (int i = 1; i < SEGMENTS; ++i)
                if (unit >= ends[i - 1]) bytes = chunk_bytes[i], wide = chunk_columns[i];
            const int tile = min((unit - m.first_unit) * 4 + ((group * TILES + lane) & 3), m.tiles - 1);
            const int per_row = (columns + wide - 1) / wide, per_stage = 256 / wide;
            const u8* source = m.data + ((i64)tile * per_row + begin * per_stage) * bytes;
            for (int chunk = begin; chunk < end; ++chunk) {
                if (count == EARLY) {  // no more before the input: it would queue behind them
                    pdl_wait();
                    if (!RESIDENT) fetch_held(EARLY), pdl_launch();
                    held = false;
                }
                if (count >= STAGES) barrier_wait(empty + stage * 8, parity);
                const int mine = lane < TILES ? min(per_stage, per_row - chunk * per_stage) * bytes : 0;
                const int all = (int)__reduce_add_sync(FULL_MASK, (u32)mine);
                if (lane == 0) barrier_expect(full + stage * 8, all + WEIGHTS_AT);
                __syncwarp();
                if (mine)
                    bulk_copy<true>(stages + stage * STAGE + WEIGHTS_AT + lane * TILE_STRIDE, source, mine, full + stage * 8);
                if (!RESIDENT && !held && lane == 0)
                    bulk_copy<false>(stages + stage * STAGE, operand + (i64)chunk * X_BYTES, X_BYTES, full + stage * 8);
                source += (i64)per_stage * bytes;
                ++count;
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
        if (held) {
            pdl_wait();
            if (!RESIDENT) fetch_held(count), pdl_launch();
        }
#if CLUSTER > 1
        __syncwarp();
        cluster_barrier();
        cluster_barrier();
#endif
        return;
    }

    if (FETCHERS == 128) registers_more<112>();  // 4 * 128 * 112 + 128 * 32 are all that 640 threads of 96 had
    if (RESIDENT && norm && threadIdx.x == 0)  // each block brings its share of the norm's weight into the L2
        for (int k = blockIdx.x * 32; k < columns; k += gridDim.x * 32)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(norm + k));
    pdl_wait();
    const int g = lane >> 2, t = lane & 3;
    if (RESIDENT) {
        const bool wide = ((columns | x_stride) & 3) == 0 && (((u64)x | (u64)norm) & 15) == 0;
        constexpr int AHEAD = 4, WARPS = CONSUMERS / 32;
        const int work = (end - begin) * batch;
        for (int first = warp; first < work; first += WARPS * AHEAD) {
            float4 v[AHEAD][2], weight[AHEAD][2];
#pragma unroll
            for (int n = 0; n < AHEAD; ++n) {
                const int item = first + n * WARPS, b = item % batch;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int k = (begin + item / batch) * 256 + i * 128 + lane * 4, limit = item < work ? columns : 0;
                    v[n][i] = four_of(x + (i64)b * x_stride, k, limit, wide);
                    if (norm) weight[n][i] = four_of(norm, k, limit, wide);
                }
            }
#pragma unroll
            for (int n = 0; n < AHEAD; ++n) {
                const int item = first + n * WARPS;
                if (item < work) convert(v[n], weight[n], norm != nullptr, item % batch, NT, lane, shared + item / batch * X_BYTES);
            }
        }
        publish_operand();
        named_barrier(1, CONSUMERS);
        pdl_launch();
    }
    float square = 0.0f;
    int stage = 0;
    u32 parity = 0;
    for (int group = first_group; group < groups; group += step) {
        Sums acc;
#pragma unroll
        for (int i = 0; i < NT * 4; ++i) acc[i] = 0.0f;
        [[maybe_unused]] const int format = FORMATS > 1 ? segment_of(min((group * TILES + warp) >> 2, units - 1)).format : 0;
        for (int chunk = begin; chunk < end; ++chunk) {
            barrier_wait(full + stage * 8, parity);
            const int quads = min(2, (columns - chunk * 256 + 127) >> 7);
            const u8* const x = RESIDENT ? shared + (chunk - begin) * X_BYTES : ring + stage * STAGE;
            const float* const factors = (const float*)(x + FLOATS_AT);
            const u32 x_at = shared_address(x);
            if (threadIdx.x < NT * 8) square += factors[NT * 8 + threadIdx.x];
            const u8* const tile = ring + stage * STAGE + WEIGHTS_AT + warp * TILE_STRIDE;
#define ADD_COLUMNS(F) add_columns<F>(tile, x_at, factors, batch, quads, lane, acc)
            FOR_FORMAT(format, ADD_COLUMNS)
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + stage * 8);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }

        auto factor_of = [&](int b) {  // of the norm
            float sum = squares[b];
            if (CLUSTER > 1) {
                sum = float_from_rank(shared_address(squares + b), 0);
#pragma unroll
                for (int r = 1; r < CLUSTER; ++r) sum += float_from_rank(shared_address(squares + b), r);
            }
            return rsqrtf(fmaf(sum, 1.0f / columns, eps));
        };
        [[maybe_unused]] auto finish = [&](float v, const Segment& m, int row, float before) {  // not paired
            if (m.scale) v *= m.scale[0];
            if (bias) v += bias[m.column + row];
            v = activate(v * alpha);
            return add ? before + v : v;
        };
        auto finish_pair = [&](float gate, float up, const Segment& m) {
            const float factor = m.scale ? m.scale[0] : 1.0f;
            return activate(gate * factor * alpha) * (up * factor * alpha);
        };
        if (group == first_group && threadIdx.x < NT * 8) squares[threadIdx.x] = square;
        if (group == first_group || CLUSTER > 1) named_barrier(1, CONSUMERS);
#if CLUSTER == 1
        if (norm)
#pragma unroll
            for (int j = 0; j < NT * 2; ++j) {
                const float factor = factor_of((j >> 1) * 8 + t * 2 + (j & 1));
                acc[(j >> 1) * 4 + (j & 1)] *= factor, acc[(j >> 1) * 4 + (j & 1) + 2] *= factor;
            }
#if LEAVES_HALVES
        // Outputs through shared memory, over stages that all warps have read: then a warp has all of a sequence's.
        float* const kept = (float*)shared;
        const Segment m = segment_of(0);
#pragma unroll
        for (int i = 0; i < NT * 4; ++i) {
            const int b = (i >> 2) * 8 + t * 2 + (i & 1), row = (group * TILES + warp) * 8 + g;
            if (!(i & 2)) kept[b * FINISHED_STRIDE + warp * 8 + g] = row < m.rows ? finish_pair(acc[i], acc[i | 2], m) : 0.0f;
        }
        named_barrier(1, CONSUMERS);
        float4 v[WARP_SEQUENCES];
#pragma unroll
        for (int k = 0; k < WARP_SEQUENCES; ++k) v[k] = *(const float4*)(kept + (warp + k * TILES) * FINISHED_STRIDE + lane * 4);
        leave_halves(v, warp, TILES, batch, group & 1, lane, out + (group >> 1) * 256, out_stride, m.rows - (group >> 1) * 256,
                     emitted + (i64)(group >> 1) * X_BYTES, words + (group >> 1) * MOST_SEQUENCES);
#else
        if (const int unit = (group * TILES + warp) >> 2; unit < units) {
            const Segment m = segment_of(unit);
            const int tile = (unit - m.first_unit) * 4 + ((group * TILES + warp) & 3);
#pragma unroll
            for (int i = 0; i < NT * 4; ++i) {
                const int b = (i >> 2) * 8 + t * 2 + (i & 1), row = PAIRED ? tile * 8 + g : tile * 16 + (i & 2) * 4 + g;
                if (b >= batch || row >= m.rows) continue;
                float* const at = out + (i64)b * out_stride + m.column + row;
                if (!PAIRED) *at = finish(acc[i], m, row, add ? __ldcg(at) : 0.0f);
                else if (!(i & 2)) *at = finish_pair(acc[i], acc[i | 2], m);
            }
        }
#endif
#else
        // Every block leaves its sums in its shared memory, over what it has used, and finishes its share of the sequences: a
        // warp all outputs of the cluster. What is added to is read while others still multiply.
        float* const kept = (float*)shared;
#pragma unroll
        for (int i = 0; i < NT * 4; ++i) {
            const int b = (i >> 2) * 8 + t * 2 + (i & 1), row = (warp & 3) * 16 + (i & 2) * 4 + g;
            kept[((warp >> 2) * NT * 8 + b) * KEPT_STRIDE + row] = acc[i];
        }
        cluster_arrive();
#if LEAVES_HALVES
        const Segment m = segment_of(0);
        const int b = rank + CLUSTER * warp, first = (lane >> 3) * NT * 8 * KEPT_STRIDE + (lane >> 1 & 3) * 16 + (lane & 1) * 4;
        float4 v[WARP_SEQUENCES];
        cluster_wait();
#pragma unroll
        for (int k = 0; k < WARP_SEQUENCES; ++k) {
            const int sequence = b + k * CLUSTER * TILES, left = m.rows - group * 128 - lane * 4;
            v[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (sequence >= batch || left <= 0) continue;
            const float factor = norm ? factor_of(sequence) : 1.0f;
            const u32 from = shared_address(shared) + (first + sequence * KEPT_STRIDE) * 4;
            float4 gate = load_from_rank(from, 0), up = load_from_rank(from + 32, 0);
#pragma unroll
            for (int r = 1; r < CLUSTER; ++r) {
                const float4 more = load_from_rank(from, r), w = load_from_rank(from + 32, r);
                gate.x += more.x, gate.y += more.y, gate.z += more.z, gate.w += more.w;
                up.x += w.x, up.y += w.y, up.z += w.z, up.w += w.w;
            }
            v[k].x = finish_pair(gate.x * factor, up.x * factor, m);
            if (left > 1) v[k].y = finish_pair(gate.y * factor, up.y * factor, m);
            if (left > 2) v[k].z = finish_pair(gate.z * factor, up.z * factor, m);
            if (left > 3) v[k].w = finish_pair(gate.w * factor, up.w * factor, m);
        }
        __syncwarp();
        cluster_arrive();  // this warp reads no more of the others' sums
        leave_halves(v, b, CLUSTER * TILES, batch, group & 1, lane, out + (group >> 1) * 256, out_stride,
                     m.rows - (group >> 1) * 256, emitted + (i64)(group >> 1) * X_BYTES, words + (group >> 1) * MOST_SEQUENCES);
        __syncwarp();
        cluster_wait();  // others may still read this block's
#else
        constexpr int OUTPUTS = PAIRED ? 32 : 64, OF_BLOCK = TILES * OUTPUTS / 4;  // of a unit, of a block
        constexpr int LOADS = (OF_BLOCK + 127) / 128;                              // float4s of a lane
        Segment m[LOADS];
        int row[LOADS], left[LOADS];  // of the matrix; outputs of this lane
        float4 before[LOADS], weight[LOADS];
        const bool wide = ((out_stride | (int)((u64)out >> 2)) & 3) == 0;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int at = i * 128 + lane * 4, output = group * OF_BLOCK + at, unit = output / OUTPUTS;
            m[i] = segment_of(min(unit, units - 1));
            row[i] = output - m[i].first_unit * OUTPUTS;
            left[i] = at < OF_BLOCK && unit < units ? m[i].rows - row[i] : 0;
            if (emitted && emitted_norm) weight[i] = four_of(emitted_norm, row[i], row[i] + max(left[i], 0), left[i] >= 4 && ((u64)emitted_norm & 15) == 0);
        }
        auto place = [&](int b, int i) { return out + (i64)b * out_stride + m[i].column + row[i]; };
        auto load_before = [&](int b) {
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                before[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (add && b < batch) before[i] = four_of(place(b, i), 0, left[i], wide && (m[i].column & 3) == 0 && left[i] >= 4);
            }
        };
        int b = rank + CLUSTER * warp;
        load_before(b);
        cluster_wait();
        while (b < batch) {
            const float factor = norm ? factor_of(b) : 1.0f;
            float4 v[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                const int n = left[i];
                if (n <= 0) continue;
                const int at = i * 128 + lane * 4, in_unit = at % OUTPUTS;
                const int first = PAIRED ? (in_unit >> 3) * 16 + (in_unit & 4) : in_unit;
                const u32 from = shared_address(shared) + ((at / OUTPUTS * NT * 8 + b) * KEPT_STRIDE + first) * 4;
                float4 sum = load_from_rank(from, 0), up = PAIRED ? load_from_rank(from + 32, 0) : sum;
#pragma unroll
                for (int r = 1; r < CLUSTER; ++r) {
                    const float4 more = load_from_rank(from, r);
                    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
                    if (PAIRED) {
                        const float4 w = load_from_rank(from + 32, r);
                        up.x += w.x, up.y += w.y, up.z += w.z, up.w += w.w;
                    }
                }
                auto finished = [&](float sum, float up, int k, float before) {
                    return PAIRED ? finish_pair(sum * factor, up * factor, m[i]) : finish(sum * factor, m[i], row[i] + k, before);
                };
                v[i].x = finished(sum.x, up.x, 0, before[i].x);
                if (n > 1) v[i].y = finished(sum.y, up.y, 1, before[i].y);
                if (n > 2) v[i].z = finished(sum.z, up.z, 2, before[i].z);
                if (n > 3) v[i].w = finished(sum.w, up.w, 3, before[i].w);
                float* const to = place(b, i);
                if (wide && n >= 4 && (m[i].column & 3) == 0) {
                    *(float4*)to = v[i];
                } else {
                    to[0] = v[i].x;
                    if (n > 1) to[1] = v[i].y;
                    if (n > 2) to[2] = v[i].z;
                    if (n > 3) to[3] = v[i].w;
                }
            }
#if SEGMENTS == 1 && TILES * (PAIRED ? 8 : 16) == 256
            __syncwarp();
            if (emitted)
                convert(v, weight, emitted_norm != nullptr, b, NT, lane, emitted + (i64)group * X_BYTES);
#endif
            b += CLUSTER * TILES;
            load_before(b);
        }
        __syncwarp();
        cluster_barrier();  // others may still read this block's sums
#endif
#endif
    }
}
