"""Templates and calls of model families, and texts as models would write them."""
