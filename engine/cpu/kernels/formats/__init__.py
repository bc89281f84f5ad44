"""One decoder per block format: packed bytes in, vectors of weights out. Importing this package registers them all.

Float products read weights through them. How integer products read a format is in ../integer/panel_formats.py.
"""

from engine.cpu.kernels.formats import grids, low_bits  # noqa: F401 - imported for the decoders they register
