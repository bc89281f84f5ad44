// Keys of an indexer into the paged cache, and which rows attend to all positions before them.
//
// grid (T), 128 threads. keys float32, `row` floats from one row to the next, the first INDEX_WIDTH of each are the key;
// cache [pages][PAGE][INDEX_WIDTH]; block_table int32 [sequences][max_pages], -1 = no page: the key is dropped; row_sequence,
// positions int32 [T], position -1 (or behind the table) = a padded row. A row at position p sees p + 1 positions: `whole`
// int32 [T] is p where these are at most all_chosen, `choosing` where they are more, else both are -1.
// Defines: CACHE_HALF, PAGE, INDEX_WIDTH. Needs cache_numbers.cuh.
extern "C" __global__ void __launch_bounds__(128)
    index_append(const float* keys, int row, cache_t* cache, const int* block_table, int max_pages,
                 const int* row_sequence, const int* positions, int all_chosen, int* whole, int* choosing) {
    pdl_launch();
    pdl_wait();
    const int position = positions[blockIdx.x], slot = position / PAGE;
    const bool padded = position < 0 || slot >= max_pages;
    if (threadIdx.x == 0) {
        whole[blockIdx.x] = padded || position >= all_chosen ? -1 : position;
        choosing[blockIdx.x] = padded || position < all_chosen ? -1 : position;
    }
    if (padded) return;
    const int page = block_table[(i64)row_sequence[blockIdx.x] * max_pages + slot];
    if (page < 0) return;
    const float* from = keys + (i64)blockIdx.x * row;
    cache_t* to = cache + ((i64)page * PAGE + (position & (PAGE - 1))) * INDEX_WIDTH;
    for (int d = threadIdx.x; d < INDEX_WIDTH; d += 128) to[d] = to_cache(from[d]);
}
