"""Kernels over rows of activations: norms, activations, RoPE, biases."""
