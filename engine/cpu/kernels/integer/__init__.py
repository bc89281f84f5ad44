"""Products of integers: activations of 8 bits, panels of eight rows of weights, the loops for one row and for many."""
