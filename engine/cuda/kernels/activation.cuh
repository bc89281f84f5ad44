// Elementwise functions of the feed-forward part, by the numbers of matvec.Activation.
DEVICE float activate(float x, int kind) {
    switch (kind) {
        case 1: return x / (1.0f + expf(-x));                                                        // SiLU
        case 2: return 0.5f * x * (1.0f + tanhf(0.7978845608f * x * (1.0f + 0.044715f * x * x)));    // GELU, tanh form
        case 3: return 0.5f * x * (1.0f + erff(x * 0.7071067812f));                                  // GELU, exact
        case 4: return fmaxf(x, 0.0f);
        case 5: return x > 0.0f ? x * x : 0.0f;
        default: return x;
    }
}
