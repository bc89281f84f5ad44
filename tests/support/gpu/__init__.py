"""GPU tests: references of kernels, kernels compiled for the CPU, and cards that are only pretended."""
