// Shared memory of attention_prefill_hopper.cu, and the barriers between the warpgroup that fills it and those that
// compute. Joined before one of prefill_pages_half.cuh and prefill_pages_q8.cuh. Needs hopper.cuh.

#define CONSUMER_THREADS (CONSUMERS * 128)
#define THREADS (128 + CONSUMER_THREADS)
#define KEY_BLOCKS ((KEY_DIM + 63) / 64)
#define VALUE_BLOCKS ((VALUE_DIM + 63) / 64)
#define QUERY_BYTES (KEY_BLOCKS * 64 * BLOCK_ROW)  // of one warpgroup
#define COLUMN_BLOCK (TILE_COLUMNS * BLOCK_ROW)    // 64 elements of a step's keys or values
#define KEY_BYTES (KEY_BLOCKS * COLUMN_BLOCK)
#define VALUE_BYTES (VALUE_BLOCKS * COLUMN_BLOCK)
#define STAGES 2
#ifndef PING_PONG
#define PING_PONG 1
#endif
#define PAGES (TILE_COLUMNS / PAGE)

#ifndef RAW_SLOTS
#define RAW_SLOTS 0
#endif
#define PRODUCER_BARRIER 5

struct Barriers {  // shared addresses, one per stage; one per copy of bytes that are still to be converted, and these
    u32 keys_full, keys_free, values_full, values_free, raw_full, raw;
};

DEVICE u32 of_stage(u32 barrier, int n) { return barrier + n % STAGES * 8; }
DEVICE int phase_of(int n) { return n / STAGES & 1; }
