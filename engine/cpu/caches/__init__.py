"""What layers keep between steps on the CPU: pages of keys and values, states, and the cache of the whole model."""
