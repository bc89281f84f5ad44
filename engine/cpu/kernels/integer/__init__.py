"""Products of integers: activations of 8 bits, panels of eight rows of weights, the loops for one row and for many.

Importing this package registers the panels of all formats.
"""

from engine.cpu.kernels.integer import (  # noqa: F401 - imported for the panels they register
    grid_panels,
    low_bit_panels,
    panel_formats,
    wide_panels,
)
