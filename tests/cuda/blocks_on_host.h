// What kernel files whose threads work together need on top of cuda_on_host.h: barriers, shared memory and shuffles.
//
// The threads of a block are coroutines of one CPU thread. Each runs until it waits for its warp or its block, and goes on
// when all of those wait or have ended. Waits that can never end stop the program.
#include "cuda_on_host.h"

#include <cstdio>
#include <cstdlib>
#include <ucontext.h>
#include <vector>

#define WARP 32
#define __shared__ static  // blocks run one after the other
struct int2 { int x, y; };
static int2 make_int2(int x, int y) { return {x, y}; }

enum class Wait { NONE, FOR_WARP, FOR_BLOCK, ENDED };

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 << 10);
    Wait wait = Wait::NONE;
    float given[2];  // to shuffles, by turns: one thread may give to the next one before another took this one's
    int shuffles = 0;
};

static ucontext_t scheduler;
static std::vector<Thread> threads;
static void (*thread_body)(void*);
static void* thread_argument;

static void wait_for(Wait what) {
    Thread& mine = threads[threadIdx.x];
    mine.wait = what;
    swapcontext(&mine.context, &scheduler);
}

static void __syncthreads() { wait_for(Wait::FOR_BLOCK); }

static float __shfl_xor_sync(u32, float v, int offset) {
    Thread& mine = threads[threadIdx.x];
    const int turn = mine.shuffles++ & 1;
    mine.given[turn] = v;
    wait_for(Wait::FOR_WARP);
    return threads[threadIdx.x ^ offset].given[turn];
}

static float __shfl_sync(u32, float v, int lane) {
    Thread& mine = threads[threadIdx.x];
    const int turn = mine.shuffles++ & 1;
    mine.given[turn] = v;
    wait_for(Wait::FOR_WARP);
    return threads[threadIdx.x / WARP * WARP + lane].given[turn];
}

static void __syncwarp() { wait_for(Wait::FOR_WARP); }

static bool __any_sync(u32, bool v) {
    float any = v;
    for (int offset = WARP / 2; offset > 0; offset /= 2) any += __shfl_xor_sync(FULL_MASK, any, offset);
    return any != 0.0f;
}

static void thread_main() {
    thread_body(thread_argument);
    wait_for(Wait::ENDED);
}

// Lets threads first..last go on if each of them waits for the same or has ended; whether one does.
static bool release(int first, int last, Wait what) {
    bool waits = false;
    for (int i = first; i < last; ++i) {
        if (threads[i].wait != what && threads[i].wait != Wait::ENDED) return false;
        waits = waits || threads[i].wait == what;
    }
    for (int i = first; waits && i < last; ++i)
        if (threads[i].wait == what) threads[i].wait = Wait::NONE;
    return waits;
}

template <class Run>
static void launch_blocks(int grid_x, int grid_y, int n_threads, Run run) {
    gridDim.x = grid_x, gridDim.y = grid_y, blockDim.x = n_threads;
    thread_body = [](void* argument) { (*(Run*)argument)(); };
    thread_argument = &run;
    for (blockIdx.y = 0; blockIdx.y < grid_y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid_x; ++blockIdx.x) {
            threads = std::vector<Thread>(n_threads);
            for (Thread& thread : threads) {
                getcontext(&thread.context);
                thread.context.uc_stack.ss_sp = thread.stack.data();
                thread.context.uc_stack.ss_size = thread.stack.size();
                makecontext(&thread.context, thread_main, 0);
            }
            for (int ended = 0; ended < n_threads;) {
                bool moved = false;
                for (int i = 0; i < n_threads; ++i) {
                    if (threads[i].wait != Wait::NONE) continue;
                    threadIdx.x = i, moved = true;
                    swapcontext(&scheduler, &threads[i].context);
                    if (threads[i].wait == Wait::ENDED) ++ended;
                }
                for (int i = 0; i < n_threads; i += WARP) moved |= release(i, min(i + WARP, n_threads), Wait::FOR_WARP);
                moved |= release(0, n_threads, Wait::FOR_BLOCK);
                if (!moved && ended < n_threads) fprintf(stderr, "the threads of a block wait for each other\n"), abort();
            }
        }
}
