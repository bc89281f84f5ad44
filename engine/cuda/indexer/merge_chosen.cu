// Adds the partial sums of attention_chosen in the order of their ranges; see attention_chosen.cuh, which is needed.
// grid (T, HEADS), 128 threads.
extern "C" __global__ void __launch_bounds__(128)
    merge_chosen(const int* positions, const float* sinks, int n_ranges, const float* partial,
                 const float2* partial_max_sum, float* out) {
    pdl_launch();
    pdl_wait();
    if (positions[blockIdx.x] < 0) return;
    const i64 place = (i64)blockIdx.x * HEADS + blockIdx.y;
    for (int d = threadIdx.x; d < VALUE_DIM; d += 128) {
        Sum all;
        all.top = LOWEST, all.weight = 0.0f;
        float total = 0.0f;
        for (int split = 0; split < n_ranges; ++split) {
            const i64 slot = place * n_ranges + split;
            const float2 one = partial_max_sum[slot];
            Sum more;
            more.top = one.x, more.weight = one.y;
            const float2 factors = join(all, more);
            total = joined(total, partial[slot * VALUE_DIM + d], factors);
        }
        out[place * VALUE_DIM + d] = total * final_factor(all.top, all.weight, sinks, blockIdx.y);
    }
}
