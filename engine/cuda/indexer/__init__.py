"""Attention whose positions an indexer chooses: scores, choice, and attention over what is chosen."""
