"""Decode steps and prompt batches out of the launches of the other rooms."""
