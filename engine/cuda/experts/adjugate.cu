// Which adjugate experts a row uses, and with which weights (engine/model/config/ffn.py AdjugateConfig).

// ids int32, weights float32 [T][used], in place: from the experts that a row chose, best first, to the groups of the first
// `best` of them, each group once, and -1. scores [T][experts]. The weight of a group is the softmax of the scores at its
// number, divided by the sum over the best experts' groups, times scale, and once for every such expert. A warp per row.
extern "C" __global__ void __launch_bounds__(32)
    adjugate_weights(const float* scores, int experts, int used, int best, int per_group, float scale, int* ids,
                     float* weights) {
    pdl_launch();
    pdl_wait();
    const i64 row = blockIdx.x;
    const int lane = threadIdx.x, chosen = lane < best ? ids[row * used + lane] : -1;
    const float* const given = scores + row * experts;
    float largest = -INFINITY, sum = 0.0f;
    for (int i = lane; i < experts; i += 32) largest = fmaxf(largest, given[i]);
    largest = warp_max(largest);
    for (int i = lane; i < experts; i += 32) sum += expf(given[i] - largest);
    sum = warp_sum(sum);
    const int group = chosen < 0 ? -1 : chosen / per_group;
    const float p = chosen < 0 ? 0.0f : expf(given[group] - largest) / sum;
    // The smallest normal half, as the sum's lower bound, is what the models were run with.
    const float weight = p / fmaxf(warp_sum(p), 6.103515625e-5f) * scale;
    float all = 0.0f;
    bool first = true;
    for (int other = 0; other < best; ++other) {
        const int of = __shfl_sync(FULL_MASK, group, other);
        const float more = __shfl_sync(FULL_MASK, weight, other);
        if (of == group) all += more, first = first && other >= lane;
    }
    if (lane >= used) return;
    ids[row * used + lane] = first ? group : -1;
    weights[row * used + lane] = first ? all : 0.0f;
}
