// What kernel files whose threads work together need on top of cuda_on_host.h: barriers, shared memory and shuffles.
//
// The threads of a block are coroutines of one CPU thread. Each runs until it waits for lanes of its warp or for its
// block, and goes on when all of those wait or have ended. Waits that can never end stop the program. A coroutine is
// begun once and serves the threads of its number in all blocks; its turns are changed by _setjmp, which, other than
// swapcontext, asks nothing of the operating system.
#define THREADS_MEET
#undef _FORTIFY_SOURCE  // its longjmp refuses other stacks
#include "cuda_on_host.h"

#include <cstdio>
#include <cstdlib>
#include <csetjmp>
#include <ucontext.h>
#include <vector>

#define WARP 32
#define __shared__ static  // blocks run one after the other
#define DYNAMIC_SHARED(name) static __align__(128) u8 name[228 << 10]
struct int2 { int x, y; };
static int2 make_int2(int x, int y) { return {x, y}; }

enum class Wait { NONE, FOR_WARP, FOR_BLOCK, ENDED };

struct Words {  // what a thread gives to the others of its warp
    u32 word[8];
};

struct Thread {
    ucontext_t context;
    jmp_buf place;
    char* stack = nullptr;  // null: not begun
    Wait wait = Wait::NONE;
    u32 mask = 0;         // lanes that it waits for
    Words given, shown;  // given becomes shown when the lanes have met: the next one may be given before this is read
};

static jmp_buf scheduler;
static std::vector<Thread> coroutines(1024);
static Thread* const threads = coroutines.data();
static int n_threads;
static void (*thread_body)(void*);
static void* thread_argument;

static void wait_for(Wait what, u32 mask = FULL_MASK) {
    Thread& mine = threads[threadIdx.x];
    mine.wait = what;
    mine.mask = mask;
    if (!_setjmp(mine.place)) _longjmp(scheduler, 1);
}

static void __syncthreads() { wait_for(Wait::FOR_BLOCK); }
static void __syncwarp() { wait_for(Wait::FOR_WARP); }

// Gives words to the lanes of a mask, this thread's among them, and waits for them; then shown_by() gives theirs.
static void meet(u32 mask, const Words& words) {
    assert(mask >> threadIdx.x % WARP & 1);
    threads[threadIdx.x].given = words;
    wait_for(Wait::FOR_WARP, mask);
}

static const Words& shown_by(u32 mask, int lane) {
    assert(mask >> lane & 1);  // what other lanes have is undefined
    return threads[threadIdx.x / WARP * WARP + lane].shown;
}

template <class T>
static T from_lane(u32 mask, T v, int lane) {
    static_assert(sizeof(T) == 4, "a word");
    meet(mask, {bits_of<u32>(v)});
    return bits_of<T>(shown_by(mask, lane).word[0]);
}

static float __shfl_sync(u32 mask, float v, int lane) { return from_lane(mask, v, lane & (WARP - 1)); }
static int __shfl_sync(u32 mask, int v, int lane) { return from_lane(mask, v, lane & (WARP - 1)); }
template <class T>
static T __shfl_xor_sync(u32 mask, T v, int offset) { return from_lane(mask, v, threadIdx.x % WARP ^ offset); }
template <class T>
static T __shfl_up_sync(u32 mask, T v, int offset) {
    const int lane = threadIdx.x % WARP;
    return from_lane(mask, v, lane < offset ? lane : lane - offset);
}

static u32 __ballot_sync(u32 mask, bool v) {
    meet(mask, {v});
    u32 votes = 0;
    for (int lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1) votes |= shown_by(mask, lane).word[0] << lane;
    return votes;
}
static bool __any_sync(u32 mask, bool v) { return __ballot_sync(mask, v) != 0; }
static int atomicAdd(int* to, int v) {  // the threads of a block are one after the other
    const int old = *to;
    *to += v;
    return old;
}
static float __fdividef(float a, float b) { return a / b; }
static int __ffs(u32 v) { return __builtin_ffs(v); }

// d += a * b as common.cuh lays it over the lanes.
static void mma16(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    meet(FULL_MASK, {a0, a1, a2, a3, b0, b1});
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) {
            const u32 a = shown_by(FULL_MASK, 4 * g + k % 8 / 2).word[2 * (k / 8) + i / 2];
            const u32 b = shown_by(FULL_MASK, 4 * (2 * t + i % 2) + k % 8 / 2).word[4 + k / 8];
            d[i] += half_to_float((u16)(a >> k % 2 * 16)) * half_to_float((u16)(b >> k % 2 * 16));
        }
}

// The same of 8 columns of floats, of which TF32 keeps the first bits.
static float first_bits(u32 v) { return bits_of<float>(v & 0xffffe000u); }
static void mma8(float* d, float a0, float a1, float a2, float a3, float b0, float b1) {
    meet(FULL_MASK, {bits_of<u32>(a0), bits_of<u32>(a1), bits_of<u32>(a2), bits_of<u32>(a3), bits_of<u32>(b0), bits_of<u32>(b1)});
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 8; ++k) {
            const u32 a = shown_by(FULL_MASK, 4 * g + k % 4).word[2 * (k / 4) + i / 2];
            const u32 b = shown_by(FULL_MASK, 4 * (2 * t + i % 2) + k % 4).word[4 + k / 4];
            d[i] += first_bits(a) * first_bits(b);
        }
}

// As in common.cuh.
static uint4 load_stream(const void* p) { return *(const uint4*)p; }
template <class T>
static T __ldg(const T* p) { return *p; }
template <class T>
static T __ldcg(const T* p) { return *p; }
static float rsqrtf(float v) { return 1.0f / sqrtf(v); }

// Addresses in shared memory count from some place in it.
static char shared_begin;
static u32 shared_address(const void* p) { return (u32)((const char*)p - &shared_begin); }
static void load_matrix4_transposed(u32 (&r)[4], u32 address) {
    meet(FULL_MASK, {address});
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
        u16 pair[2];
        for (int e = 0; e < 2; ++e)
            pair[e] = ((const u16*)(&shared_begin + (int)shown_by(FULL_MASK, 8 * i + 2 * t + e).word[0]))[g];
        r[i] = pair[0] | (u32)pair[1] << 16;
    }
}

// As in common.cuh; here a copy is done at once.
template <int BYTES>
static void copy_async(void* to, const void* from, bool valid) {
    if (valid) memcpy(to, from, BYTES);
    else memset(to, 0, BYTES);
}
static void copy_commit() {}
template <int PENDING>
static void copy_wait() {}

// As in common.cuh.
static float warp_sum(float v) {
    for (int offset = WARP / 2; offset > 0; offset >>= 1) v += __shfl_xor_sync(FULL_MASK, v, offset);
    return v;
}
static float warp_max(float v) {
    for (int offset = WARP / 2; offset > 0; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL_MASK, v, offset));
    return v;
}
static float block_sum(float v, float* scratch) {
    const int warps = (blockDim.x + WARP - 1) / WARP;
    for (int offset = WARP / 2; offset > 0; offset >>= 1) v += __shfl_xor_sync(FULL_MASK, v, offset);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < warps; ++i) total += scratch[i];
    __syncthreads();
    return total;
}

static void thread_main() {
    while (true) {
        thread_body(thread_argument);
        wait_for(Wait::ENDED);
    }
}

// Runs a thread until it waits.
__attribute__((noinline)) static void run_thread(int i) {
    Thread& thread = threads[i];
    threadIdx.x = i;
    if (_setjmp(scheduler)) return;
    if (thread.stack) _longjmp(thread.place, 1);
    const size_t size = 64 << 10;
    thread.stack = (char*)malloc(size);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = size;
    makecontext(&thread.context, thread_main, 0);
    setcontext(&thread.context);
}

// Lets the threads of a block go on if all that have not ended wait for the block; whether they do.
static bool release_block() {
    bool waits = false;
    for (int i = 0; i < n_threads; ++i) {
        if (threads[i].wait != Wait::FOR_BLOCK && threads[i].wait != Wait::ENDED) return false;
        waits = waits || threads[i].wait == Wait::FOR_BLOCK;
    }
    for (int i = 0; i < n_threads; ++i)
        if (threads[i].wait == Wait::FOR_BLOCK) threads[i].wait = Wait::NONE;
    return waits;
}

// Lets lanes of the warp at `first` go on where all lanes of their mask that have not ended wait with the same mask.
static bool release_lanes(int first) {
    bool moved = false;
    const int lanes = min(WARP, n_threads - first);
    for (int i = 0; i < lanes; ++i) {
        if (threads[first + i].wait != Wait::FOR_WARP) continue;
        const u32 mask = threads[first + i].mask;
        bool met = true;
        for (int j = 0; j < lanes; ++j) {
            const Thread& other = threads[first + j];
            const bool waits = other.wait == Wait::FOR_WARP && other.mask == mask;
            met = met && (!(mask >> j & 1) || waits || other.wait == Wait::ENDED);
        }
        for (int j = 0; met && j < lanes; ++j) {
            Thread& other = threads[first + j];
            if (!(mask >> j & 1) || other.wait == Wait::ENDED) continue;
            other.wait = Wait::NONE;
            other.shown = other.given;
        }
        moved = moved || met;
    }
    return moved;
}

template <class Run>
static void launch_blocks(Dimensions grid, int block_threads, Run run) {
    assert(block_threads <= (int)coroutines.size());
    n_threads = block_threads;
    gridDim = grid, blockDim.x = n_threads;
    thread_body = [](void* argument) { (*(Run*)argument)(); };
    thread_argument = &run;
    for (int block = 0; block < grid.x * grid.y * grid.z; ++block) {
        blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
        for (int i = 0; i < n_threads; ++i) threads[i].wait = Wait::NONE;
        for (int ended = 0; ended < n_threads;) {
            bool moved = false;
            for (int i = 0; i < n_threads; ++i) {
                if (threads[i].wait != Wait::NONE) continue;
                moved = true;
                run_thread(i);
                ended += threads[i].wait == Wait::ENDED;
            }
            for (int i = 0; i < n_threads; i += WARP) moved |= release_lanes(i);
            moved |= release_block();
            if (!moved && ended < n_threads) fprintf(stderr, "the threads of a block wait for each other\n"), abort();
        }
    }
}

template <class Run>
static void launch_blocks(int grid_x, int grid_y, int block_threads, Run run) {
    launch_blocks(Dimensions{grid_x, grid_y, 1}, block_threads, run);
}
