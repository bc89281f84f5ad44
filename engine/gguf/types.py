"""Every tensor type of ggml: its id, its name and how many bytes a block of it takes.

The one place that states block sizes. What the bytes of a block mean is in quants.py.
"""

from enum import IntEnum


class GGMLType(IntEnum):
    """A tensor type; the value is the id stored in the file, names are ggml's.

    Attributes:
        block_size: elements in one block, the smallest unit that can be decoded.
        type_size: bytes in one block.
    """

    block_size: int
    type_size: int

    def __new__(cls, value: int, block_size: int = 1, type_size: int = 1) -> "GGMLType":
        """Make a member from (id, elements per block, bytes per block)."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.block_size = block_size
        member.type_size = type_size
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 40  # activations only; 40 as the gguf package has it, 36 inside ggml: no file holds it
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18
    Q2_0 = 42, 64, 18


REMOVED_TYPES: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Ids that ggml once gave out and no longer reads, by the name they had."""


def row_bytes(ggml_type: GGMLType, n_elements: int) -> int:
    """Return the bytes of n_elements consecutive elements of a row.

    Raises:
        ValueError: n_elements is not a whole number of blocks.
    """
    blocks, rest = divmod(n_elements, ggml_type.block_size)
    if rest or n_elements < 0:
        raise ValueError(f"{n_elements} elements are not whole {ggml_type.name} blocks of {ggml_type.block_size}")
    return blocks * ggml_type.type_size
