// Which ranges of which rows a block of decode attention computes.
//
// The cached positions of a row (the new token of a sequence) are cut into ranges, which depend on the row's length alone.
// All ranges of all rows, in order, are dealt to the Y blocks of a column in equal runs. With more ranges than `slots` of
// scratch memory the runs are cut between rows only. With ONE_RANGE the grid is (columns, N_SPLITS, B) and every block has
// one range: less to do before the first fetch, which is what few rows spend their time on.
// Defines (see attention_plan.py): N_SPLITS, FEW_SPLITS, MIN_CHUNK. Needs attention_common.cuh.

struct Cuts {  // what decides on a row's ranges beside its length and N_SPLITS, FEW_SPLITS, MIN_CHUNK
    int window, positions;  // positions: how many the table has room for
};

struct Task {                     // a range of a row
    int row, position, first;     // the new token, and the first position it may see
    int base, chunk, n_used;      // cached positions base .. position-1 in n_used ranges of `chunk`
    int split, low, high;         // the range at hand
    int slot0;                    // number of the row's first range among all ranges
};

struct Share {  // of the row at hand, what falls to this block
    bool whole, owns_new;
    int n_ranges;
};

// Divisions by what the compiler does not know take 20 instructions each; before anything is fetched they would show.
template <int PARTS>
DEVICE int whole_pages(int n) {
    return ((n + PARTS - 1) / PARTS + PAGE - 1) & ~(PAGE - 1);
}

DEVICE int divide_up(int a, int b) {  // a >= 0, b > 0, both below 2^23
    const int q = (int)__fdividef((float)a, (float)b);  // the quotient rounded down, or up where it is almost whole
    return q + (q * b < a);
}

// Up to 2 * MIN_CHUNK cached positions are one range, which needs no merge; then come FEW_SPLITS ranges until they hold
// 2 * MIN_CHUNK each, then N_SPLITS of them. Gives the number of ranges, 0 for a padded row.
DEVICE int cut(Task& task, int position, const Cuts& cuts) {
    const bool padded = position < 0 || position >= cuts.positions;
    task.position = position;
    task.first = first_seen(position, cuts.window);
    task.base = task.first & ~(PAGE - 1);
    const int n = position - task.base;
    task.chunk = 2 * MIN_CHUNK;
    task.n_used = padded ? 0 : 1;
    if (n > 2 * MIN_CHUNK && !padded) {
        task.chunk = max(MIN_CHUNK, min(whole_pages<FEW_SPLITS>(n), 2 * MIN_CHUNK));
        task.chunk = max(task.chunk, whole_pages<N_SPLITS>(n));
        task.n_used = divide_up((n + PAGE - 1) / PAGE, task.chunk / PAGE);
    }
    return task.n_used;
}

DEVICE void take_range(Task& task, int split) {
    task.split = split;
    task.low = task.base + split * task.chunk;
    task.high = min(task.low + task.chunk, task.position);
}

// The range after this one; only where there is one. `peek` is the position of the row after the task's, asked for long
// before it is needed: memory answers late while it is busy.
DEVICE void advance(Task& task, int& peek, const int* positions, int rows, const Cuts& cuts) {
    if (task.split + 1 < task.n_used) {
        take_range(task, task.split + 1);
        return;
    }
    task.slot0 += task.n_used;
    ++task.row;
    for (int n = cut(task, peek, cuts); n == 0; n = cut(task, positions[task.row], cuts)) ++task.row;
    take_range(task, 0);
    peek = positions[min(task.row + 1, rows - 1)];
}

struct Ranges {  // lane l counts the ranges of rows from .. to-1; `until` are its own and those of the lanes before it
    int from, to, mine, until;
};

// The row that holds range number `at`: its row, slot0 and cut. Whole warp.
DEVICE void find_row(Task& task, const Ranges& ranges, int at, const int* positions, const Cuts& cuts) {
    const int lane = threadIdx.x & 31, owner = __ffs(__ballot_sync(FULL_MASK, ranges.until > at)) - 1;
    task.row = ranges.from;
    task.slot0 = ranges.until - ranges.mine;
    if (ranges.to - ranges.from > 1 && lane == owner)
        while (task.slot0 + cut(task, positions[task.row], cuts) <= at) task.slot0 += task.n_used, ++task.row;
    task.row = __shfl_sync(FULL_MASK, task.row, owner);
    task.slot0 = __shfl_sync(FULL_MASK, task.slot0, owner);
    task.position = __shfl_sync(FULL_MASK, task.position, owner);
    task.first = __shfl_sync(FULL_MASK, task.first, owner);
    task.base = __shfl_sync(FULL_MASK, task.base, owner);
    task.chunk = __shfl_sync(FULL_MASK, task.chunk, owner);
    task.n_used = __shfl_sync(FULL_MASK, task.n_used, owner);
}

// The first range of this block's run; gives the length of the run. `busy`: more than half of the blocks have one. Every
// warp does the same.
DEVICE int take_share(Task& task, bool& busy, const int* positions, int rows, const Cuts& cuts, int slots) {
    const int lane = threadIdx.x & 31, each = (rows + WARP - 1) / WARP;
    Ranges ranges = {min(lane * each, rows), min((lane + 1) * each, rows), 0, 0};
    constexpr int AHEAD = 4;  // lengths that are asked for at once
#pragma unroll 1
    for (int row = ranges.from; row < ranges.to; row += AHEAD) {
        int lengths[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) lengths[i] = row + i < ranges.to ? positions[row + i] : -1;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (row + i < ranges.to) ranges.mine += cut(task, lengths[i], cuts);  // find_row() takes a lone row's cut from here
    }
    ranges.until = ranges.mine;
#pragma unroll
    for (int offset = 1; offset < WARP; offset <<= 1) {
        const int before = __shfl_up_sync(FULL_MASK, ranges.until, offset);
        if (lane >= offset) ranges.until += before;
    }
    const u32 total = __shfl_sync(FULL_MASK, ranges.until, WARP - 1);
    // The first blocks of a column get one more than the others: they start first, each on a multiprocessor of its own.
    busy = 2 * total > gridDim.y;
    const u32 each_block = total / gridDim.y, more = total % gridDim.y;
    int at = each_block * blockIdx.y + min(blockIdx.y, more), end = at + each_block + (blockIdx.y < more);
    if (total > slots) {  // to the next row's start
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            if (end < total) {
                Task found = task;
                find_row(found, ranges, end, positions, cuts);
                if (found.slot0 < end) end = found.slot0 + found.n_used;
            }
            const int swap = at;
            at = end, end = swap;
        }
    }
    if (at == end) return 0;
    find_row(task, ranges, at, positions, cuts);
    take_range(task, at - task.slot0);
    return end - at;
}

// With ONE_RANGE: whether there is a range for this block.
DEVICE bool take_one(Task& task, const int* positions, const Cuts& cuts) {
    task.row = blockIdx.z;
    task.slot0 = task.row * N_SPLITS;
    if (blockIdx.y >= cut(task, positions[task.row], cuts)) return false;
    take_range(task, blockIdx.y);
    return true;
}

DEVICE Share share_of_row(const Task& task, int left) {
    const int n = min(left, task.n_used - task.split);
    return {n == task.n_used, task.split + n == task.n_used, n};
}
