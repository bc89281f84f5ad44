// Routing of one row by one warp: which experts it uses, and with which weights.
//
// Defines: EXPERTS to choose from, USED of them; GATING 0 softmax over all experts, 1 sigmoid, 2 softmax over the chosen
// ones, 3 the root of softplus; ROUTE_GROUPS, GROUPS_USED; NORMALIZE; SHARED experts of every row behind those that it chooses; SHARED_SCORED: a row has
// one more score, whose sigmoid is their weight.

constexpr int PER_LANE = (EXPERTS + 31) / 32, PLACES = USED + SHARED, SCORES = EXPERTS + SHARED_SCORED;
static_assert(PLACES <= 32, "a lane of a warp for each expert of a row");

struct Routed {
    float gate[EXPERTS], of_group[ROUTE_GROUPS], weights[32], shared_score;
    int ids[32];
};

// Floats as integers of the same order; 0 is below all of them.
DEVICE u32 ordered(float v) {
    const u32 bits = __float_as_uint(v);
    return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

DEVICE u32 warp_max_u32(u32 v) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(FULL_MASK, v);
#else
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) v = max(v, __shfl_xor_sync(FULL_MASK, v, offset));
    return v;
#endif
}

// Softmax over all experts, where the choice needs it: without a bias and groups the scores have the same order.
DEVICE bool needs_softmax(const float* bias) { return GATING == 0 && (ROUTE_GROUPS > 1 || bias); }

// Whole warp. The USED best of gate + bias (bias null: of gate) are chosen, best first, ties to the lower expert; with
// groups only from the GROUPS_USED groups whose two best sum highest. Scores that are no numbers still give experts that
// exist. Leaves the gates, or the scores where needs_softmax() is false, for weigh_chosen(). The experts of every row follow.
DEVICE void choose_experts(const float* scores, const float* bias, Routed& out, int lane) {
    if (lane < SHARED) out.ids[USED + lane] = EXPERTS + lane;
    if (SHARED_SCORED && lane == 0) out.shared_score = __ldcg(scores + EXPERTS);
    float gate[PER_LANE];
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        gate[j] = j * 32 + lane < EXPERTS ? __ldcg(scores + j * 32 + lane) : -INFINITY;
        largest = fmaxf(largest, gate[j]);
    }
    if (needs_softmax(bias)) {
        largest = warp_max(largest);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) sum += gate[j] = expf(gate[j] - largest);
        sum = warp_sum(sum);
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) gate[j] /= sum;
    } else if (GATING == 1) {
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) gate[j] = 1.0f / (1.0f + expf(-gate[j]));
    } else if (GATING == 3) {
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) gate[j] = sqrtf(gate[j] > 20.0f ? gate[j] : log1pf(expf(gate[j])));
    }
    float choice[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const int i = j * 32 + lane;
        if (i < EXPERTS) out.gate[i] = gate[j];
        choice[j] = i < EXPERTS && bias ? gate[j] + bias[i] : gate[j];
    }
    if (ROUTE_GROUPS > 1) {
        __syncwarp();
        constexpr int SIZE = EXPERTS / ROUTE_GROUPS;
        for (int g = lane; g < ROUTE_GROUPS; g += WARP) {
            float first = -INFINITY, second = -INFINITY;
            for (int i = g * SIZE; i < (g + 1) * SIZE; ++i) {
                const float v = out.gate[i] + (bias ? bias[i] : 0.0f);
                second = fmaxf(second, fminf(first, v));
                first = fmaxf(first, v);
            }
            out.of_group[g] = SIZE > 1 ? first + second : first;
        }
        __syncwarp();
        // A group is out if at least GROUPS_USED others are better, or equal and before it.
        u32 open = 0;
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            const int mine = (j * 32 + lane) / SIZE;
            if (mine >= ROUTE_GROUPS) continue;
            int better = 0;
            for (int g = 0; g < ROUTE_GROUPS; ++g)
                better += out.of_group[g] > out.of_group[mine] || (out.of_group[g] == out.of_group[mine] && g < mine);
            if (better < GROUPS_USED) open |= 1u << j;
        }
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j)
            if (!(open >> j & 1u)) choice[j] = -INFINITY;
    }
    u32 key[PER_LANE], best = 0u;  // 0: taken, or no expert
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        key[j] = j * 32 + lane < EXPERTS ? max(ordered(choice[j]), 1u) : 0u;
        best = max(best, key[j]);
    }
#pragma unroll 1
    for (int k = 0; k < USED; ++k) {
        const u32 most = warp_max_u32(best);
        int at = EXPERTS;  // this lane's first expert with that key
#pragma unroll
        for (int j = PER_LANE - 1; j >= 0; --j)
            if (key[j] == most) at = j * 32 + lane;
        const u32 holders = __ballot_sync(FULL_MASK, best == most);
        int owner = __ffs(holders) - 1;
        if (holders & (holders - 1u)) owner = (int)~warp_max_u32(~(u32)(best == most ? at : EXPERTS)) & 31;
        if (lane == owner) out.ids[k] = at;
        best = 0u;
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            if (lane == owner && at == j * 32 + lane) key[j] = 0u;
            best = max(best, key[j]);
        }
    }
    __syncwarp();
}

// Whole warp, after choose_experts(): weights are the gates without bias, divided by their sum if NORMALIZE, times
// weight_scale. Those of the experts of every row: shared_scale, times the sigmoid of their score.
DEVICE void weigh_chosen(const float* bias, float weight_scale, float shared_scale, Routed& out, int lane) {
    float weight = lane < USED ? out.gate[out.ids[lane]] : 0.0f, sum = 0.0f;
    const float largest = out.gate[out.ids[0]];
    if (GATING == 2 || (GATING == 0 && !needs_softmax(bias))) {
        if (GATING == 0 && !NORMALIZE)
            for (int i = lane; i < EXPERTS; i += 32) sum += expf(out.gate[i] - largest);
        weight = lane < USED ? expf(weight - largest) : 0.0f;
        if (GATING == 0 && !NORMALIZE) weight /= warp_sum(sum);
    }
    // The smallest normal half, as the sum's lower bound, is what the models were run with.
    if (GATING == 2 || NORMALIZE) weight /= fmaxf(warp_sum(weight), 6.103515625e-5f);
    weight *= weight_scale;
    if (SHARED && lane >= USED) weight = SHARED_SCORED ? shared_scale / (1.0f + expf(-out.shared_score)) : shared_scale;
    out.weights[lane] = weight;
    __syncwarp();
}
