// Quantized matrix times 1..8 vectors, straight from the packed layouts of formats.cuh.
//
// Defines: SEGMENTS matrices of FORMATS formats FORMAT0.. (FORMAT_OF, CHUNK_BYTES_OF, CHUNK_COLUMNS_OF per matrix);
// NB sequences per mma and GROUPS_OF_NB such groups; WARPS of a block, SPLIT of them share the columns of one tile (a
// team); each warp streams its own chunks through DEPTH slots of SLOT bytes of shared memory.
// OPERAND: matvec_operand.cu has converted x (Hopper, up to four sequences); blocks copy it, a slab ahead of the products.
//
// Order of every sum, whatever the batch: columns in slabs of 4096; within one, units of 256 (or 128) columns are dealt
// to the SPLIT warps; a lane sums sub-blocks of one residue mod 4, then (0+1)+(2+3), warps 0..SPLIT-1, slabs.

constexpr int SLAB = 4096;
#ifndef OPERAND
#define OPERAND 0
#endif

// ---- the matrices of a launch --------------------------------------------------------------------------------
struct Segment {
    const u8* data;
    const float* scale;
    int first_tile, rows, column, format, chunk_bytes, chunk_columns;
};

#define SEGMENT_PARAMETERS(n) const u8 *data##n, const float *scale##n, int tiles##n, int rows##n, int column##n,

// out = f(alpha * (norm(x) W^T + bias)) or out += ...; see matvec.py for shapes. grid <= tiles.
// RESIDENT: all of x stays in shared memory and tiles are the outer loop; else slabs are. ONE_SLAB: columns <= SLAB.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    matvec(ALL_SEGMENTS int tiles, int columns, int unit, int batch, const float* x, int x_stride,
           const float* norm, float eps, const float* bias, float* out, int out_stride, int add, float alpha,
           float one_column) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, team = warp / SPLIT, member = warp % SPLIT;

    // shared memory: ring | scales that lanes leave for others | partial sums [team][2][SPLIT][SEQUENCES][16] | barriers | sums of squares
    // [SPLIT][SEQUENCES][4] | halves | sums | scales | factors of the norm [team][SEQUENCES][16] | running sums of tiles
    constexpr bool resident = RESIDENT;
    const int slabs = ONE_SLAB ? 1 : (columns + SLAB - 1) / SLAB;
    const int all_quads = (columns + 127) / 128, quads = resident ? all_quads : SLAB / 128 * (1 + OPERAND);
    u8* const ring = shared + warp * (DEPTH * SLOT);
    constexpr int LEFT_AT = WARPS * DEPTH * SLOT, PARTIAL_AT = LEFT_AT + WARPS * LEFT_SCALES;
    float* const partial = (float*)(shared + PARTIAL_AT) + team * (2 * SPLIT * SEQUENCES * 16);
    u64* const barriers = (u64*)(shared + PARTIAL_AT + WARPS * 2 * SEQUENCES * 64);
    float* const squares = (float*)(barriers + WARPS * DEPTH + (OPERAND ? SPLIT * 2 : 0));
    const u32 input_barrier = shared_address(barriers + WARPS * DEPTH + member * 2);
    u8* const input = (u8*)(squares + SPLIT * 4 * SEQUENCES);
    float* const inverses = (float*)(input + quads * SEQUENCES * QUAD_BYTES);
    float* const running = inverses + TEAMS * SEQUENCES * 16;
    Inputs in;
    in.quads = quads;
    in.pieces = shared_address(input);
    in.scales = (const float*)(input + quads * SEQUENCES * 32 * PIECE);
    in.sums = (const float2*)(in.scales + quads * SEQUENCES * 4);
    in.bytes = input;
    in.floats = (const float4*)in.scales;
    in.scales_left = (float4*)(shared + LEFT_AT + warp * LEFT_SCALES);
    const u32 ring_at = shared_address(ring), barrier_at = shared_address(barriers + warp * DEPTH);
    const int stride = gridDim.x * TEAMS, first_tile = blockIdx.x + gridDim.x * team;

    auto segment_of = [&](int tile) {
        const u8* const data[SEGMENTS] = ALL_OF(data);
        const float* const scale[SEGMENTS] = ALL_OF(scale);
        const int ends[SEGMENTS] = ALL_OF(tiles), rows[SEGMENTS] = ALL_OF(rows), column[SEGMENTS] = ALL_OF(column);
        constexpr int format[SEGMENTS] = FORMAT_OF, bytes[SEGMENTS] = CHUNK_BYTES_OF, wide[SEGMENTS] = CHUNK_COLUMNS_OF;
        Segment s = {data[0], scale[0], 0, rows[0], column[0], format[0], bytes[0], wide[0]};
#pragma unroll
        for (int i = 1; i < SEGMENTS; ++i)
            if (tile >= ends[i - 1])
                s = {data[i], scale[i], ends[i - 1], rows[i], column[i], format[i], bytes[i], wide[i]};
        return s;
    };
    // This warp's columns of a slab, in units, and in chunks of a width.
    const int unit_bits = unit == 256 ? 8 : 7, units = (columns + unit - 1) >> unit_bits;
    const int slab_units = SLAB >> unit_bits, last_units = units - (slabs - 1) * slab_units;
    const int whole_begin = member * slab_units / SPLIT, whole_end = (member + 1) * slab_units / SPLIT;
    const int last_begin = member * last_units / SPLIT, last_end = (member + 1) * last_units / SPLIT;
    auto unit_range = [&](int slab, int& begin, int& end) {
        const bool last = ONE_SLAB || slab == slabs - 1;
        begin = slab * slab_units + (last ? last_begin : whole_begin);
        end = slab * slab_units + (last ? last_end : whole_end);
    };
    auto chunk_shift = [&](int width) { return unit > width ? 1 : 0; };

    // The producer runs DEPTH chunks ahead of the consumer, over tiles and slabs in the same order.
    int next_tile = first_tile, next_slab = 0, left = 0, next_bytes = segment_of(0).chunk_bytes;
    const u8* next_source = nullptr;
    auto advance = [&]() {  // moves to the next tile or slab with work; false at the end
        while (true) {
            if (next_tile >= tiles) {
                if (resident || next_tile == first_tile || ++next_slab >= slabs) return false;
                next_tile = first_tile;
            }
            const Segment s = segment_of(next_tile);
            int begin, end;
            unit_range(next_slab, begin, end);
            const int shift = chunk_shift(s.chunk_columns);
            next_source = s.data + (i64)(((next_tile - s.first_tile) * units + begin) << shift) * s.chunk_bytes;
            if (SEGMENTS > 1) next_bytes = s.chunk_bytes;
            left = (end - begin) << shift;
            if (resident) {
                if (ONE_SLAB) next_tile += stride;
                else if (++next_slab == slabs) next_slab = 0, next_tile += stride;
            } else {
                next_tile += stride;
            }
            if (left > 0) return true;
        }
    };
    auto produce = [&](int slot) {
        if (left > 0 || advance()) {
            fetch(ring_at + slot * SLOT, barrier_at + slot * 8, next_source, next_bytes, lane);
            next_source += next_bytes;
            --left;
        }
        fetch_commit();
    };

    if (lane == 0)
        for (int i = 0; i < DEPTH; ++i) open_slot(barrier_at + i * 8);
#if OPERAND
    if (lane == 0 && team == 0) open_slot(input_barrier), open_slot(input_barrier + 8);
#endif
    publish_slots();
    __syncwarp();
    int filled = 0;
    auto fill = [&](int count) {
#pragma unroll 1
        for (; filled < count; ++filled) produce(filled);
    };
    // With 16 warps and a norm only the first warps fetch before the wait: the bytes of all 16 would delay the input
    // that the block waits for (H200, 8B Q4_K_M, one sequence: 643.5 to 650.7 tok/s).
    if (OPERAND || WARPS < 16 || !norm || warp < (PAIRED ? 9 : 6)) fill(EARLY);
    bring_grids();
    // Each block brings its share of the norm's weight into the L2.
    if (!OPERAND && norm && threadIdx.x == 0)
        for (int k = blockIdx.x * 32; k < columns; k += gridDim.x * 32)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(norm + k));
    if (!OPERAND && team == 0)
        for (int i = lane; i < 4 * SEQUENCES; i += 32) squares[member * 4 * SEQUENCES + i] = 0.0f;
    if (TEAMS > 1)
        named_barrier(1 + member, TEAMS * 32);
    else
        __syncwarp();
    pdl_wait();

    // Splits this member's columns of a slab into halfs, shared out among the teams: lane l has columns 4l .. 4l+3 of a
    // quad, which are sub-block l / 8, group l / 4 % 2, and the mma lanes' t = l % 4.
    const bool wide_loads = ((columns | x_stride) & 3) == 0 && (((u64)x | (u64)norm) & 15) == 0;
    const int s = lane >> 3, half = (lane >> 2) & 1, t = lane & 3;
    const int pieces_lane = FEW ? ((s >> 1) * 32 + t) * 16 + (s & 1) * 8 + half * 4
                                : ((s / R) * 32 + (s % R) * 2 * NB * 4 + t) * PIECE + half * (PIECE / 2);
    constexpr int LANE_BYTES = FEW ? 16 : PIECE;  // from one lane's pieces to the next's
    auto quad_range = [&](int slab, int& begin, int& end) {
        unit_range(slab, begin, end);
        begin <<= unit_bits - 7;
        end = min(end << (unit_bits - 7), all_quads);
    };
#if OPERAND
    // This member's columns of a slab of the operand, into the one of two places whose slab no warp reads any more.
    auto copy_slab = [&](int slab) {
        int begin, end;
        quad_range(slab, begin, end);
        const int place = ONE_SLAB ? begin : begin - slab * (SLAB / 128) + (slab & 1) * (SLAB / 128), count = max(end - begin, 0);
        const u32 barrier = input_barrier + (slab & 1) * 8;
        const u8* const from = (const u8*)x;
        const bool with_squares = norm && slab == 0;
        if ((count <= 0 && !with_squares) || lane || team) return;
        barrier_expect(barrier, count * 1280 + (with_squares ? 64 : 0));
        if (count > 0) {
            bulk_copy<false>(shared_address(input) + place * 1024, from + begin * 1024, count * 1024, barrier);
            bulk_copy<false>(shared_address(input) + quads * 1024 + place * 256, from + all_quads * 1024 + begin * 256,
                             count * 256, barrier);
        }
        if (with_squares)
            bulk_copy<false>(shared_address(squares + member * 16), from + all_quads * 1280 + member * 64, 64, barrier);
    };
    auto next_input = [&](int slab) {
        int begin, end;
        quad_range(slab, begin, end);
        if (slab == 0) {
            copy_slab(0);
            if (slabs > 1) copy_slab(1);
            fill(DEPTH);
        } else {
            if (TEAMS > 1)
                named_barrier(1 + member, TEAMS * 32);
            else
                __syncwarp();
            if (slab + 1 < slabs) copy_slab(slab + 1);
        }
        if (begin < end || (norm && slab == 0)) barrier_wait(input_barrier + (slab & 1) * 8, (slab >> 1) & 1);
    };
#endif
    // The first sequence's input of the next slab is loaded while this slab is multiplied.
    constexpr int AHEAD = TEAMS == 1 ? 4 : 2, TOGETHER = SEQUENCES < 4 ? SEQUENCES : 4;
    float4 coming[AHEAD];
    auto load_ahead = [&](int slab) {
        int begin, end;
        quad_range(slab, begin, end);
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
            const int quad = begin + team + n * TEAMS, k = quad * 128 + lane * 4;
            if (wide_loads && quad < end && k < columns) coming[n] = __ldcg((const float4*)(x + k));
        }
    };
    auto convert = [&](int slab) {
        int begin, end;
        quad_range(slab, begin, end);
        const int base = resident ? 0 : slab * (SLAB / 128);
        // Rows are asked for together: one after the other would wait for memory once for each.
        for (int b0 = 0; b0 < batch; b0 += TOGETHER) {
            const float* row = x + (i64)b0 * x_stride + lane * 4;
            // One sum of squares per residue of the quad mod 4, so that their order does not depend on TEAMS.
            constexpr int CLASSES = 4 / TEAMS;
            float square[TOGETHER][CLASSES] = {};
            for (int first = begin + team; first < end; first += TEAMS * AHEAD) {
                float4 v[TOGETHER][AHEAD], weight[AHEAD];
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
                    for (int n = 0; n < AHEAD; ++n) {
                        const int quad = first + n * TEAMS;
                        const bool there = quad < end && (i == 0 || b0 + i < batch);
                        const int left = there ? columns - quad * 128 - lane * 4 : 0;
                        v[i][n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                        if (i == 0) weight[n] = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
                        const float *at = row + (i64)i * x_stride + quad * 128, *of_norm = norm + quad * 128 + lane * 4;
                        if (wide_loads) {
                            if (left > 0) {
                                const bool loaded =
                                    !ONE_SLAB && RESIDENT && slab > 0 && b0 + i == 0 && first == begin + team;
                                v[i][n] = loaded ? coming[n] : __ldcg((const float4*)at);
                                if (norm && i == 0) weight[n] = __ldg((const float4*)of_norm);
                            }
                        } else {
                            if (left > 0) v[i][n].x = __ldcg(at);
                            if (left > 1) v[i][n].y = __ldcg(at + 1);
                            if (left > 2) v[i][n].z = __ldcg(at + 2);
                            if (left > 3) v[i][n].w = __ldcg(at + 3);
                            if (norm && i == 0) {
                                if (left > 0) weight[n].x = of_norm[0];
                                if (left > 1) weight[n].y = of_norm[1];
                                if (left > 2) weight[n].z = of_norm[2];
                                if (left > 3) weight[n].w = of_norm[3];
                            }
                        }
                    }
                fill(DEPTH);  // behind the input, which is waited for first
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) {
                    const int b = b0 + i, first_slot = (b / NB) * quads - base, bn = b % NB;
                    if (i > 0 && b >= batch) break;
#pragma unroll
                    for (int n = 0; n < AHEAD; ++n) {
                        const int quad = first + n * TEAMS;
                        if (quad < end) {
                            float& sq = square[i][n % CLASSES];
                            sq = fmaf(v[i][n].x, v[i][n].x, sq), sq = fmaf(v[i][n].y, v[i][n].y, sq);
                            sq = fmaf(v[i][n].z, v[i][n].z, sq), sq = fmaf(v[i][n].w, v[i][n].w, sq);
                            float4 y = v[i][n];
                            if (norm) y.x *= weight[n].x, y.y *= weight[n].y, y.z *= weight[n].z, y.w *= weight[n].w;
                            const int place = first_slot + quad, index = (place * 4 + s) * NB + bn;
                            u8* const at = input + place * (NB * 32 * PIECE) + pieces_lane + bn * (8 * LANE_BYTES);
                            float undo;
                            if (HALVES) {
                                const float largest = largest_of_eight(
                                    fmaxf(fmaxf(fabsf(y.x), fabsf(y.y)), fmaxf(fabsf(y.z), fabsf(y.w))));
                                // 2^e with 2^e * largest in [2^14, 2^15)
                                const u32 exponent = min(max(__float_as_uint(largest) >> 23, 20u), 240u);
                                const float up = __uint_as_float((268u - exponent) << 23);
                                undo = __uint_as_float((exponent - 14u) << 23);
                                y.x *= up, y.y *= up, y.z *= up, y.w *= up;
                                const u32 high0 = two_halves(y.x, y.y), high1 = two_halves(y.z, y.w);
                                const u32 low0 = two_halves(y.x - low_half(high0), y.y - high_half(high0));
                                const u32 low1 = two_halves(y.z - low_half(high1), y.w - high_half(high1));
                                *(uint2*)at = make_uint2(high0, high1);
                                *(uint2*)(at + 4 * PIECE) = make_uint2(low0, low1);
                            } else {
                                u32 high, low;
                                const float own = split_four(y, high, low, undo);
                                *(u32*)at = high;
                                *(u32*)(at + 4 * LANE_BYTES) = low;
                                if (FEW) {
                                    const float other = __shfl_xor_sync(FULL_MASK, own, 4);
                                    if ((lane & 7) == 0) ((float4*)in.floats)[index] = make_float4(undo, own + other, own, other);
                                } else if (t == 0) {
                                    ((float*)in.sums)[index * 2 + half] = own;
                                }
                            }
                            if (!FEW && (lane & 7) == 0) ((float*)in.scales)[index] = undo;
                        }
                    }
                }
            }
            if (norm)
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
                    for (int n = 0; n < CLASSES; ++n) {
                        if (i > 0 && b0 + i >= batch) break;
                        const float sum = warp_sum(square[i][n]);
                        if (lane == 0) squares[(member * SEQUENCES + b0 + i) * 4 + team + n * TEAMS] += sum;
                    }
        }
        if (TEAMS > 1)
            named_barrier(1 + member, TEAMS * 32);
        else
            __syncwarp();
    };

    int slot = 0, tile = first_tile, slab = 0, turn = 0, ordinal = 0;
    u32 parity = 0;
    bool fresh = true;
    constexpr int OUTPUTS = SEQUENCES * 16, TEAM_THREADS = SPLIT * 32, PER_THREAD = (OUTPUTS + TEAM_THREADS - 1) / TEAM_THREADS;
    const int rank = member * 32 + lane;
    float before[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) before[i] = 0.0f;

    while (true) {
        if (fresh) {
#if OPERAND
            next_input(slab);
#else
            if (!resident) __syncthreads();
            convert(slab);
#endif
            fill(DEPTH);
            // Not before: the next kernel's weights would queue in front of this one's input.
            pdl_launch();
            if (!ONE_SLAB && RESIDENT && slab + 1 < slabs) load_ahead(slab + 1);
        }
        if (tile < tiles) {
            const Segment m = segment_of(tile);
            const int local = tile - m.first_tile;
            // What this thread will store: (sequence, row of the tile), one or more of them.
            if (rank < OUTPUTS && (resident ? slab == 0 : slab == slabs - 1))
#pragma unroll
                for (int i = 0; i < PER_THREAD; ++i) {
                    const int index = rank + i * TEAM_THREADS, b = index >> 4, row = local * 16 + (index & 15);
                    if (add && b < batch && row < m.rows) before[i] = __ldcg(out + (i64)b * out_stride + m.column + row);
                }
            int begin, end;
            unit_range(slab, begin, end);
            const int per_chunk = m.chunk_columns / 128;
            int quad = (begin << (unit_bits - 7)) - (resident ? 0 : slab * (SLAB / 128)) +
                       (OPERAND && !resident ? (slab & 1) * (SLAB / 128) : 0);
            end = (end - begin) << chunk_shift(m.chunk_columns);
            Sums acc;
#pragma unroll
            for (int i = 0; i < SEQUENCES * 2; ++i) (&acc[0][0][0])[i] = 0.0f;
            Columns columns_of_x;
            columns_of_x.clear();
            for (int chunk = 0; chunk < end; ++chunk, quad += per_chunk) {
                fetch_wait(barrier_at + slot * 8, parity);
                const u8* const at = ring + slot * SLOT;
#define ADD_CHUNK(F) add_chunk<F>(at, quad, in, lane, columns_of_x, acc)
                FOR_FORMAT(m.format, ADD_CHUNK)
                __syncwarp();
                produce(slot);
                if (++slot == DEPTH) slot = 0, parity ^= 1;
            }

            // Lanes, then warps, in a fixed order.
            float* const mine = partial + turn * (SPLIT * OUTPUTS);
            turn ^= 1;
#pragma unroll
            for (int j = 0; j < GROUPS_OF_NB; ++j)
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    float v;
                    if (NB == 4) {
                        v = (acc[j][0][row] + acc[j][NB > 1 ? 1 : 0][row]) +
                            (acc[j][NB > 2 ? 2 : 0][row] + acc[j][NB > 3 ? 3 : 0][row]);
                    } else if (NB == 2) {
                        const float first = acc[j][0][row], second = acc[j][NB > 1 ? 1 : 0][row];
                        v = (first + __shfl_xor_sync(FULL_MASK, first, 2)) +
                            (second + __shfl_xor_sync(FULL_MASK, second, 2));
                    } else {
                        v = acc[j][0][row];
                        v += __shfl_xor_sync(FULL_MASK, v, 1);
                        v += __shfl_xor_sync(FULL_MASK, v, 2);
                    }
                    if ((lane & 3) < NB)
                        mine[member * OUTPUTS + (j * NB + (lane & 3)) * 16 + row * 8 + (lane >> 2)] = v;
                }
            named_barrier(TEAMS > 1 ? 1 + SPLIT + team : 1, TEAM_THREADS);
            if (member * 32 < OUTPUTS) {
#pragma unroll
                for (int i = 0; i < PER_THREAD; ++i) {
                    const int index = rank + i * TEAM_THREADS, b = index >> 4, in_tile = index & 15;
                    const bool live = index < OUTPUTS;
                    float sum = 0.0f;
                    if (live)
#pragma unroll
                        for (int w = 0; w < SPLIT; ++w) sum += mine[w * OUTPUTS + index];
                    if (slabs > 1 && live) {
                        float* const kept = running + ((ordinal * TEAMS + team) * OUTPUTS + index);
                        if (slab) sum += *kept;
                        *kept = sum;
                    }
                    if (ONE_SLAB || slab == slabs - 1) {
                        float value = sum;
                        if (m.scale) value *= m.scale[0];
                        if (norm) {
                            // Each thread keeps its own sequence's factor, found at its first tile.
                            float* const kept = inverses + team * OUTPUTS + (live ? index : 0);
                            float inverse;
                            if (tile == first_tile) {
                                float4 square = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
                                for (int w = 0; w < SPLIT; ++w) {
                                    const float4 v = *(const float4*)(squares + (w * SEQUENCES + (live ? b : 0)) * 4);
                                    square.x += v.x, square.y += v.y, square.z += v.z, square.w += v.w;
                                }
                                const float all = (square.x + square.y) + (square.z + square.w);
                                inverse = rsqrtf(fmaf(all, one_column, eps));
                                if (live) *kept = inverse;
                            } else {
                                inverse = *kept;
                            }
                            value *= inverse;
                        }
                        if (PAIRED) {
                            const float up = __shfl_xor_sync(FULL_MASK, value, 8) * alpha;
                            const int row = local * 8 + in_tile;
                            if (live && in_tile < 8 && b < batch && row < m.rows)
                                out[(i64)b * out_stride + row] = activate(value * alpha) * up;
                        } else {
                            const int row = local * 16 + in_tile;
                            if (live && b < batch && row < m.rows) {
                                if (bias) value += bias[m.column + row];
                                value = activate(value * alpha);
                                out[(i64)b * out_stride + m.column + row] = add ? before[i] + value : value;
                            }
                        }
                    }
                }
            }
        }
        if (resident) {
            if (ONE_SLAB || ++slab == slabs) {
                slab = 0;
                tile += stride;
                fresh = false;
                if (tile >= tiles) break;
            }
        } else {
            tile += stride;
            ++ordinal;
            fresh = false;
            if (tile >= tiles) {
                tile = first_tile;
                ordinal = 0;
                fresh = true;
                if (++slab == slabs) break;
            }
        }
    }
}
