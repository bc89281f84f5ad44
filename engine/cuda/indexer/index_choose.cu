// The best of the scores of a row, in ascending order of their places: single positions, or blocks of BLOCK positions.
//
// grid (T, CHOICES), 1024 threads; rows with position -1 are left alone. scores float32 [T][CHOICES][most], of which a row at
// position p has p / BLOCK + 1, more than `count`; chosen int32 [T][CHOICES][count]. Of equal scores the first are taken, NaN
// counts as lowest, and the newest `local` blocks are always among the best. With TAIL full blocks alone have scores, and the
// block behind them, which is not full, follows what is chosen: chosen int32 [T][CHOICES][count + 1].
// Every score becomes a number whose order is that of the scores. Its bits are found from the highest on, by counting, 11,
// 11 and 10 at a time: the least number that is chosen, and how many of those that equal it. Then warps write their shares.
// Defines: CHOICES, BLOCK, TAIL.

#define THREADS 1024
#define BINS 2048

DEVICE u32 order_of(float score, bool local) {
    if (local) score = __uint_as_float(0x7f800000u);
    if (score != score) score = __uint_as_float(0xff800000u);
    if (score == 0.0f) score = 0.0f;  // there is one zero
    const u32 bits = __float_as_uint(score);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The sum of v over this thread and those before it; sums: of the warps before, filled by all.
DEVICE int sum_up_to(int v, int* sums) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int offset = 1; offset < WARP; offset <<= 1) {
        const int before = __shfl_up_sync(FULL_MASK, v, offset);
        if (lane >= offset) v += before;
    }
    if (lane == WARP - 1) sums[warp] = v;
    __syncthreads();
    for (int w = 0; w < warp; ++w) v += sums[w];
    __syncthreads();
    return v;
}

extern "C" __global__ void __launch_bounds__(1024)
    index_choose(const float* scores, int most, const int* positions, int local, int count, int* chosen) {
    __shared__ int bins[BINS];
    __shared__ int sums[WARP], above_of[WARP], equal_of[WARP];
    __shared__ int found_bin, found_before;
    pdl_launch();
    pdl_wait();
    const int position = positions[blockIdx.x], warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (position < 0) return;
    const int n = TAIL ? (position + 1) / BLOCK : position / BLOCK + 1;
    const i64 place = (i64)blockIdx.x * CHOICES + blockIdx.y;
    const float* own = scores + place * most;
    u32 least = 0, known = 0;  // bits of the least number chosen, and which of its bits are found
    int needed = count;        // numbers with these bits that are still to be chosen
    for (int shift = 21; ; shift = shift == 21 ? 10 : 0) {
        const u32 digits = shift == 0 ? 1023u : 2047u;
        for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += THREADS) {
            const u32 order = order_of(own[i], i >= n - local);
            if ((order & known) == least) atomicAdd(&bins[digits - (order >> shift & digits)], 1);
        }
        __syncthreads();
        // Bins begin with the highest digit. A thread has two of them.
        const int first = bins[2 * threadIdx.x], both = first + bins[2 * threadIdx.x + 1];
        const int until = sum_up_to(both, sums), before = until - both;
        if (before < needed && needed <= until) {
            const bool second = before + first < needed;
            found_bin = 2 * threadIdx.x + second;
            found_before = second ? before + first : before;
        }
        __syncthreads();
        least |= (digits - found_bin) << shift;
        known |= digits << shift;
        needed -= found_before;
        if (shift == 0) break;
    }
    // Of the numbers that equal the least one, the first `needed` are chosen.
    const int each = ((n + WARP - 1) / WARP + WARP - 1) / WARP * WARP, low = warp * each, high = min(low + each, n);
    int above = 0, equal = 0;
    for (int start = low; start < high; start += WARP) {
        const int i = start + lane;
        const u32 order = i < high ? order_of(own[i], i >= n - local) : 0;
        above += __popc(__ballot_sync(FULL_MASK, i < high && order > least));
        equal += __popc(__ballot_sync(FULL_MASK, i < high && order == least));
    }
    if (lane == 0) above_of[warp] = above, equal_of[warp] = equal;
    __syncthreads();
    above = equal = 0;
    for (int w = 0; w < warp; ++w) above += above_of[w], equal += equal_of[w];
    int* to = chosen + place * (count + TAIL);
    if (TAIL && threadIdx.x == 0) to[count] = n;
    for (int start = low; start < high; start += WARP) {
        const int i = start + lane;
        const u32 order = i < high ? order_of(own[i], i >= n - local) : 0, before = (1u << lane) - 1;
        const u32 is_above = __ballot_sync(FULL_MASK, i < high && order > least);
        const u32 is_equal = __ballot_sync(FULL_MASK, i < high && order == least);
        const int equals = equal + __popc(is_equal & before);
        if (is_above >> lane & 1 || (is_equal >> lane & 1 && equals < needed))
            to[above + __popc(is_above & before) + min(equals, needed)] = i;
        above += __popc(is_above);
        equal += __popc(is_equal);
    }
}
