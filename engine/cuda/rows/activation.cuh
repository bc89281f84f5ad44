// Activation functions of feed-forward networks, by the numbers of activation.py's KernelActivation:
// 0 none, 1 SiLU, 2 GELU (tanh form), 3 ReLU, 4 squared ReLU, 5 clamped SwiGLU (of gate and up together), 6 xIELU, 7 SiTU.

// Chosen when the kernel runs, for kernels that serve every model.
DEVICE float activate(float x, int kind) {
    switch (kind) {
        case 1: return x / (1.0f + expf(-x));
        case 2: return 0.5f * x * (1.0f + tanhf(0.7978845608f * x * (1.0f + 0.044715f * x * x)));
        case 3: return fmaxf(x, 0.0f);
        case 4: return x > 0.0f ? x * x : 0.0f;
        default: return x;
    }
}

// a x^2 + c x above zero, else b (exp(min(x, d)) - 1 - x) + c x; see engine.model.config.Activation.XIELU.
DEVICE float xielu(float x, float a, float b, float c, float d) {
    return fmaf(c, x, x > 0.0f ? a * x * x : b * (expm1f(fminf(x, d)) - x));
}

// a tanh(x / a) sigmoid(x); see engine.model.config.Activation.SITU.
DEVICE float situ(float x, float a) { return a * tanhf(x / a) / (1.0f + expf(-x)); }

DEVICE float clamped_swiglu(float gate, float up) {
    const float g = fminf(gate, 7.0f), u = fminf(fmaxf(up, -7.0f), 7.0f);
    return g / (1.0f + expf(-1.702f * g)) * (u + 1.0f);
}

#ifdef ACTIVATION
// Chosen when the kernel is built: a switch costs a jump through cold memory, 1 us a launch.
DEVICE float activate(float v) {
    if (ACTIVATION == 1) return __fdividef(v, 1.0f + expf(-v));
    if (ACTIVATION == 2) return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
    if (ACTIVATION == 3) return fmaxf(v, 0.0f);
    if (ACTIVATION == 4) return fmaxf(v, 0.0f) * fmaxf(v, 0.0f);
    return v;
}

DEVICE float gated(float gate, float up) {
    if (ACTIVATION == 5) return clamped_swiglu(gate, up);
    return activate(gate) * up;
}

// The same with fast functions, for results that are rounded to a half or summed from products of halves.
DEVICE float activate_fast(float x) {
    if (ACTIVATION == 1) return __fdividef(x, 1.0f + __expf(-x));
    if (ACTIVATION == 2)  // 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2 z))
        return __fdividef(x, 1.0f + __expf(-1.5957691216f * x * (1.0f + 0.044715f * x * x)));
    if (ACTIVATION == 3) return fmaxf(x, 0.0f);
    if (ACTIVATION == 4) return x > 0.0f ? x * x : 0.0f;
    return x;
}
#endif
