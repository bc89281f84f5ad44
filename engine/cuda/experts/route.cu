// Routing by itself, for prompts; see route.cuh. One warp per row: ids int32, weights float32 (T, PLACES); a row with
// positions[row] < 0 gets ids of -1 (positions may be null).
extern "C" __global__ void __launch_bounds__(32) route_top(const float* scores, const float* bias, float weight_scale,
                                                           float shared_scale, const int* positions, int* ids,
                                                           float* weights) {
    __shared__ Routed routed;
    pdl_wait();
    pdl_launch();
    const i64 row = blockIdx.x;
    const int lane = threadIdx.x;
    const bool active = !positions || positions[row] >= 0;
    if (active) {
        choose_experts(scores + row * SCORES, bias, routed, lane);
        weigh_chosen(bias, weight_scale, shared_scale, routed, lane);
    }
    if (lane < PLACES) {
        ids[row * PLACES + lane] = active ? routed.ids[lane] : -1;
        weights[row * PLACES + lane] = active ? routed.weights[lane] : 0.0f;
    }
}
