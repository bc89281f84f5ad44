"""Products of packed matrices with activations."""
