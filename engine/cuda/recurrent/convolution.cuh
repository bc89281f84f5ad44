// Causal convolutions over the last TAPS inputs of each channel, V neighbouring channels a thread, whose memory is read
// and written in vectors of V floats. The order of a token's operations is the same in all kernels.

// COUNT floats at p, which is aligned to V of them.
template <int V, int COUNT>
DEVICE void load_wide(const float* p, float* to) {
    if constexpr (V == 4) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const float4 v = *(const float4*)(p + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) to[i] = p[i];
    }
}

template <int V, int COUNT>
DEVICE void store_wide(float* p, const float* from) {
    if constexpr (V == 4) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4)
            *(float4*)(p + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) p[i] = from[i];
    }
}

// Of `channel` and those beside it: weights (channels, TAPS), the newest input's last; biases (channels) or null; a state
// (channels, TAPS - 1), the last inputs, oldest first.
template <int V, int TAPS>
struct Channels {
    static constexpr int PAST = TAPS - 1;
    float weight[V * TAPS], bias[V];
    float past[V * PAST];

    __device__ __forceinline__ void load_weights(const float* weights, const float* biases, int channel) {
        load_wide<V, V * TAPS>(weights + (i64)channel * TAPS, weight);
#pragma unroll
        for (int c = 0; c < V; ++c) bias[c] = 0.0f;
        if (biases) load_wide<V, V>(biases + channel, bias);
    }

    __device__ __forceinline__ void forget() {
#pragma unroll
        for (int i = 0; i < V * PAST; ++i) past[i] = 0.0f;
    }

    __device__ __forceinline__ void load_state(const float* state, int channel) {
        load_wide<V, V * PAST>(state + (i64)channel * PAST, past);
    }

    __device__ __forceinline__ void store_state(float* state, int channel) const {
        store_wide<V, V * PAST>(state + (i64)channel * PAST, past);
    }

    // out = bias + sum of weight * input; x becomes the newest of the past.
    __device__ __forceinline__ void step(const float* x, float* out) {
#pragma unroll
        for (int c = 0; c < V; ++c) {
            const float* w = weight + c * TAPS;
            float* p = past + c * PAST;
            float sum = __fmul_rn(p[0], w[0]);
#pragma unroll
            for (int i = 1; i < PAST; ++i) sum = fmaf(p[i], w[i], sum);
            out[c] = __fadd_rn(fmaf(x[c], w[PAST], sum), bias[c]);
#pragma unroll
            for (int i = 1; i < PAST; ++i) p[i - 1] = p[i];
            p[PAST - 1] = x[c];
        }
    }
};
