"""Tables of n-grams on the GPU, the kernel file beside its launcher."""
