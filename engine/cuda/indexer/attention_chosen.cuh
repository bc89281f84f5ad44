// Attention of single rows over the positions that an indexer has chosen: what its kernels share.
//
// attention_chosen (attention_chosen_plain.cu, attention_chosen_half.cu): grid (T, columns * R), 256 threads. A block serves up
// to HEAD_TILE query heads of one cache head, a column. The chosen positions are cut into n_ranges ranges of `range`; where
// they are `dealt`, R is n_ranges and a block has one of them and leaves a partial sum, else R is 1 and it has them all.
// Partial sums are added in the order of the ranges with the same instructions, by merge_chosen or by the block itself: the
// same bits. Rows with position -1 are left alone.
// qkv float32 [T][ROW_WIDTH] with rotated queries, whose keys and values are in the cache; block_table int32
// [sequences][max_pages]; row_sequence, positions int32 [T]; chosen int32 [T][CHOICES][count], ascending blocks of BLOCK
// positions for each cache head, or one choice for all; positions of a block that are behind the row are left out;
// partial float32 [T][HEADS][n_ranges][VALUE_DIM]; partial_max_sum float2 [T][HEADS][n_ranges]; out float32
// [T][HEADS * VALUE_DIM]. Defines: HEAD_TILE, CHOICES, and BLOCK or WINDOW, SPAN, TOP and PAGE_ROWS, and those of
// attention_common.cuh, which is needed.

#define THREADS 256
#define WARPS 8
#define TILE 32  // positions that are read together
#define HEAD_TILES ((GROUP + HEAD_TILE - 1) / HEAD_TILE)

struct Sum {  // of weights relative to 2^top
    float top, weight;
};

// Factors of two sums of values in their joint sum, which becomes the first.
DEVICE float2 join(Sum& all, Sum more) {
    const float risen = fmaxf(all.top, more.top);
    const float2 factors = make_float2(power2(all.top - risen), power2(more.top - risen));
    all.weight = fmaf(all.weight, factors.x, __fmul_rn(more.weight, factors.y));
    all.top = risen;
    return factors;
}

DEVICE float joined(float all, float more, float2 factors) {
    return fmaf(all, factors.x, __fmul_rn(more, factors.y));
}

#ifdef WINDOW
// Places of a row are a window of WINDOW positions and then blocks of SPAN positions, each with one row of the cache: those of
// the list where the row sees more than TOP, else all that end at or before it. A page has PAGE_ROWS rows, those of positions
// and, of blocks that end in it, those behind them. A row of the cache is key and value.
#define PLACES(count) (WINDOW + (count))
DEVICE int chosen_row(const int* list, int place, int end, int position, const int* pages, int kv_head) {
    int last = place < end ? position - WINDOW + 1 + place : -1, row = last % PAGE;
#if SPAN
    if (place >= WINDOW && place < end) {
        const int n = (position + 1) / SPAN, i = place - WINDOW;
        const bool chooses = TOP && n > TOP;
        if (i >= (chooses ? TOP : n)) return -1;
        last = ((chooses ? list[i] : i) + 1) * SPAN - 1, row = PAGE + last % PAGE / SPAN;
    }
#endif
    const int page = last >= 0 && last <= position ? pages[last / PAGE] : -1;
    return page >= 0 ? page * PAGE_ROWS + row : -1;
}
#else
#define PLACES(count) ((count) * BLOCK)
// The row of keys and values at a place of a list of blocks; -1: the row does not see it.
DEVICE int chosen_row(const int* list, int place, int end, int position, const int* pages, int kv_head) {
    const int p = place < end ? list[place / BLOCK] * BLOCK + place % BLOCK : position + 1;
    const int page = p <= position ? pages[p / PAGE] : -1;
    return page >= 0 ? (int)cache_row(page, kv_head, p) : -1;
}
#endif
