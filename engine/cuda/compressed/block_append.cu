// What attention over a window and compressed blocks caches of single positions, and which rows choose among blocks.
//
// grid (T), 128 threads. keys, left: rows of float32; HEAD numbers of a key, and LEFT numbers that keys of blocks are made of:
// values and gates, KEY_GATES each, then likewise INDEX_GATES for the index. Gates get ape[position mod SPAN], float32
// [SPAN][KEY_GATES] and [SPAN][INDEX_GATES]. cache [pages][PAGE_ROWS][HEAD], of which the first PAGE rows are positions; kept
// [pages][PAGE][LEFT]. block_table int32 [sequences][max_pages], -1 = no page; row_sequence, positions int32 [T], -1 = a padded
// row. choosing int32 [T]: the position of rows that see more than TOP blocks, else -1; not written without TOP.
// Defines: CACHE_HALF, PAGE, PAGE_ROWS, HEAD, SPAN, LEFT, KEY_GATES, INDEX_GATES, TOP. Needs cache_numbers.cuh.
extern "C" __global__ void __launch_bounds__(128)
    block_append(const float* keys, int keys_row, cache_t* cache, const float* left, int left_row, const float* ape,
                 const float* index_ape, cache_t* kept, const int* block_table, int max_pages, const int* row_sequence,
                 const int* positions, int* choosing) {
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, position = positions[row], slot = position / PAGE;
    const bool padded = position < 0 || slot >= max_pages;
#if TOP
    if (threadIdx.x == 0) choosing[row] = padded || (position + 1) / SPAN <= TOP ? -1 : position;
#endif
    if (padded) return;
    const int page = block_table[(i64)row_sequence[row] * max_pages + slot];
    if (page < 0) return;
    cache_t* const key = cache + ((i64)page * PAGE_ROWS + position % PAGE) * HEAD;
    for (int d = threadIdx.x; d < HEAD; d += 128) key[d] = to_cache(keys[(i64)row * keys_row + d]);
#if SPAN
    cache_t* const to = kept + ((i64)page * PAGE + position % PAGE) * LEFT;
    for (int d = threadIdx.x; d < LEFT; d += 128) {
        const bool own = d < 2 * KEY_GATES;
        const int gates = own ? KEY_GATES : INDEX_GATES, gate = (own ? d : d - 2 * KEY_GATES) - gates;
        float v = left[(i64)row * left_row + d];
        if (gate >= 0) v += (own ? ape : index_ape)[position % SPAN * gates + gate];
        to[d] = to_cache(v);
    }
#endif
}
