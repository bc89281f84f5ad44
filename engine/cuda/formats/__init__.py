"""Packed weights: layouts, repacking, and rows expanded to plain numbers."""

from engine.cuda.driver.compiler import tables_of
from engine.cuda.formats.grid_tables import grids_of

tables_of.append(grids_of)
