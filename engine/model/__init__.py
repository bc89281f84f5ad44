"""What a model is: hyper-parameters, tensors, and the forward pass written once over a device seam.

Knows nothing of numba or cupy: a backend implements `engine.model.ops.Ops` and is handed to `engine.model.transformer`.
"""
