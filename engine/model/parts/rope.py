"""Rotation of queries and keys, as declarations name it. Read by engine/model/reading/attention/rope.py."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from engine.model.config import RopeStyle


@dataclass(frozen=True)
class RopeParts:
    """Rotary position embedding.

    Attributes:
        style: which elements of a head are rotated together.
        base: default of rope.freq_base.
        sections: the style where rope.dimension_sections splits the frequencies among several axes of position; None =
            the key is not read.
        switch: rope.scaling.finetuned says whether anything is rotated.
        halved: only half of rope.dimension_count elements are rotated in layers without a window.
        skip_every: the last layer of each n rotates nothing; in families with windows only where the model has them.
        skip_first: it is the first layer of each n instead.
        dense_lead: the first leading_dense_block_count layers rotate, also where others without a window do not.
        pattern: attention.rope_pattern may list which layers rotate.
        long_factors: rope_factors_long and rope_factors_short divide the frequencies.
        divisors: the tensor rope_freqs.weight may divide the frequencies.
        n_layers: only models of so many layers rotate; None = any.
        beta_fast: default of rope.scaling.yarn_beta_fast.
    """

    style: RopeStyle
    _: KW_ONLY
    base: float = 10000.0
    sections: RopeStyle | None = None
    switch: bool = False
    halved: bool = False
    skip_every: int | None = None
    skip_first: bool = False
    dense_lead: bool = False
    pattern: bool = False
    long_factors: bool = False
    divisors: bool = False
    n_layers: int | None = None
    beta_fast: float = 32.0
