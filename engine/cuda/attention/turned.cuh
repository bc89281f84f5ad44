// Numbers rotated as at a position: pairs (i, i + DIM / 2) with HALVES, else of neighbours. Threads `first`, first + step, ...
// take a pair each. inv_freq float64 [DIM / 2]; cos and sin are multiplied by `scale`. Angles are brought near zero in float64.
template <int DIM, bool HALVES>
DEVICE void turn_numbers(float* numbers, int position, const double* inv_freq, float scale, int first, int step) {
    const double turn = 6.283185307179586;
    for (int i = first; i < DIM / 2; i += step) {
        const double angle = (double)position * inv_freq[i];
        float s, c;
        sincosf((float)fma(-turn, rint(angle * (1.0 / turn)), angle), &s, &c);
        s *= scale, c *= scale;
        float* const one = numbers + (HALVES ? i : 2 * i);
        float* const other = one + (HALVES ? DIM / 2 : 1);
        const float x = *one, y = *other;
        *one = fmaf(x, c, -__fmul_rn(y, s));
        *other = fmaf(x, s, __fmul_rn(y, c));
    }
}
