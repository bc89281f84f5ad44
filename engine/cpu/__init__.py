"""The CPU backend: reference bricks in plain numpy, and the fast products in `kernels`."""
