// Experts that a token names, whatever their scores: those of all others become minus infinity, whose gate is 0, so that
// the routing (route.cuh) chooses the named ones and weighs them by their scores.
//
// grid (T), 128 threads. scores: rows of `row` floats, the first `experts` of each are changed; tokens int32 [T]; named int32
// [vocabulary][used]. It waits for its predecessors before it lets its successor start, as the router does.
extern "C" __global__ void __launch_bounds__(128)
    keep_named(float* scores, int row, int experts, const int* tokens, const int* named, int used, int vocabulary) {
    pdl_wait();
    pdl_launch();
    const int token = tokens[blockIdx.x];
    if (token < 0 || token >= vocabulary) return;
    const int* const own = named + (i64)token * used;
    for (int expert = threadIdx.x; expert < experts; expert += 128) {
        bool is_named = false;
        for (int i = 0; i < used; ++i) is_named = is_named || own[i] == expert;
        if (!is_named) scores[(i64)blockIdx.x * row + expert] = -INFINITY;
    }
}
