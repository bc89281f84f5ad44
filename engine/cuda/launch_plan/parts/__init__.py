"""Launches of the parts of a layer, one file per kind of part."""
