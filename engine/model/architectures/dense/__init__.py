"""Families whose layers have attention and a dense feed-forward part."""
