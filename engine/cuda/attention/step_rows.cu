// Rows of a decode step that are not those of slots 0, 1, ...: of chosen slots, and of known tokens of some sequences.
//
// grid (rows), 128 threads. counts: {rows of slots, known tokens behind them}. Row r of the first is of slot chosen[r] and has
// its token, position and pages; row counts[0] + i has token i of known (3, most): tokens, positions, slots; all others have
// position -1. Of a table row what its position needs is written: nothing behind it is read.
extern "C" __global__ void __launch_bounds__(128)
    take_rows(const int* counts, const int* chosen, const int* known, int most, const int* slot_tokens,
              const int* slot_positions, const int* block_table, int max_pages, int* tokens, int* positions, int* table) {
    const int row = blockIdx.x, i = row - counts[0];
    int token = 0, position = -1, slot = 0;
    if (i < 0)
        slot = chosen[row], token = slot_tokens[slot], position = slot_positions[slot];
    else if (i < counts[1])
        token = known[i], position = known[most + i], slot = known[2 * most + i];
    if (threadIdx.x == 0) tokens[row] = token, positions[row] = position;
    if (position < 0) return;
    const int pages = min(position / PAGE + 1, max_pages);
    for (int k = threadIdx.x; k < pages; k += 128) table[(i64)row * max_pages + k] = block_table[(i64)slot * max_pages + k];
}
