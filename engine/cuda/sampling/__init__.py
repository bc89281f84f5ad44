"""Sampling kernels and the state of every slot."""
