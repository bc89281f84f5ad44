// Keys of blocks of SPAN positions, as soon as they are full: number by number the sum of the values of their positions,
// weighted by the softmax of the gates, divided by the root of the mean square, times a weight, and rotated as at the block's
// first position. With OVERLAP values and gates are twice as wide: the second half is of the block's own positions, the first
// half of those of the block before; the first block has its own alone.
//
// grid (T, 1 or 2), 256 threads: the key of attention, then that of the index. Rows whose position ends no block do nothing.
// kept, cache, block_table, row_sequence, positions: as block_append.cu has left them, of all rows. Keys go to row
// PAGE + (number of the block in the page of its last position) of cache [pages][PAGE_ROWS][HEAD], and to index_keys
// [pages][PAGE_ROWS - PAGE][INDEX]. weight float32 [HEAD], index_weight [INDEX]; inv_freq float64 [ROPE_DIM / 2].
// Defines: CACHE_HALF, PAGE, PAGE_ROWS, HEAD, INDEX, SPAN, OVERLAP, LEFT, ROPE_DIM, ROPE_HALVES. Needs cache_numbers.cuh and
// turned.cuh.

constexpr int WIDEST = HEAD > INDEX ? HEAD : INDEX;

extern "C" __global__ void __launch_bounds__(256)
    block_keys(const cache_t* kept, cache_t* cache, cache_t* index_keys, const int* block_table, int max_pages,
               const int* row_sequence, const int* positions, const float* weight, float eps, const float* index_weight,
               float index_eps, const double* inv_freq, float rope_scale) {
    __shared__ float key[WIDEST], scratch[32];
    pdl_launch();
    pdl_wait();
    const int position = positions[blockIdx.x];
    if (position < 0 || (position + 1) % SPAN || position / PAGE >= max_pages) return;
    const int* const pages = block_table + (i64)row_sequence[blockIdx.x] * max_pages;
    const int page = pages[position / PAGE];
    if (page < 0) return;
    const bool own = blockIdx.y == 0;
    const int width = own ? HEAD : INDEX, gates = (1 + OVERLAP) * width, begin = position + 1 - SPAN;
    const int first = OVERLAP && begin > 0 ? -SPAN : 0;
    // A number of value or gate of the position begin + i.
    auto number = [&](int i, int column) {
        const int p = begin + i;
        const i64 row = (i64)max(pages[p / PAGE], 0) * PAGE + p % PAGE;
        const int half = OVERLAP && i >= 0 ? width : 0;
        return from_cache(kept[row * LEFT + (own ? 0 : 2 * (1 + OVERLAP) * HEAD) + half + column]);
    };
    float squares = 0.0f;
    for (int d = threadIdx.x; d < width; d += 256) {
        float top = __uint_as_float(0xff800000u), sum = 0.0f, total = 0.0f;
        for (int i = first; i < SPAN; ++i) {
            const float gate = number(i, gates + d);
            top = gate > top || gate != gate ? gate : top;
        }
        for (int i = first; i < SPAN; ++i) {
            const float share = expf(number(i, gates + d) - top);
            total += share;
            sum = fmaf(share, number(i, d), sum);
        }
        key[d] = sum /= total;
        squares = fmaf(sum, sum, squares);
    }
    const float length = sqrtf(block_sum(squares, scratch) / width + (own ? eps : index_eps));
    for (int d = threadIdx.x; d < width; d += 256) key[d] = __fmul_rn(key[d] / length, (own ? weight : index_weight)[d]);
    __syncthreads();
    turn_numbers<ROPE_DIM, ROPE_HALVES>(key + width - ROPE_DIM, begin, inv_freq, rope_scale, threadIdx.x, 256);
    __syncthreads();
    const int place = position % PAGE / SPAN;
    cache_t* const to = own ? cache + ((i64)page * PAGE_ROWS + PAGE + place) * HEAD
                            : index_keys + ((i64)page * (PAGE_ROWS - PAGE) + place) * INDEX;
    for (int d = threadIdx.x; d < width; d += 256) to[d] = to_cache(key[d]);
}
