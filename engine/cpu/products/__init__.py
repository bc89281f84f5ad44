"""Products of activations with packed weights, in float32 (`matmul`) or in integers (`integer`)."""
