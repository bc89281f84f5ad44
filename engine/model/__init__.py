"""What a model is: hyper-parameters, tensors, and the forward pass written once over a device seam.

Independent of numba and cupy: a backend implements `engine.model.ops.Ops` and passes it to `engine.model.transformer`.
"""
