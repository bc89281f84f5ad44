"""Embeddings and rankings: texts checked, brought together in batches, vectors finished."""
