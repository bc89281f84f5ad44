"""Packed weights: layouts, repacking, and rows expanded to plain numbers."""
