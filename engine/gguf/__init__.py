"""GGUF model files: the container (reader.py, parse.py, cursor.py) and tensor types (types.py, quants.py).

formats/ has the block formats, quantizers/ writes them. Bytes and numbers only, no models.
"""

from engine.gguf.quants import FORMATS, BlockFormat, dequantize
from engine.gguf.reader import GGUFFile, MetadataValue, TensorInfo, open_gguf
from engine.gguf.types import REMOVED_TYPES, GGMLType, row_bytes

__all__ = [
    "FORMATS",
    "REMOVED_TYPES",
    "BlockFormat",
    "GGMLType",
    "GGUFFile",
    "MetadataValue",
    "TensorInfo",
    "dequantize",
    "open_gguf",
    "row_bytes",
]
