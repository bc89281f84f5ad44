"""The block formats, by kind, and the grids of the IQ formats: bytes to numbers. quants.py above has all by type."""
