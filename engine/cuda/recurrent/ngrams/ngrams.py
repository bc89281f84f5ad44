"""Launchers of ngrams.cu: vectors of the last few tokens. They are the kernels' contract. Must not know of layers.

Letters as in engine/model/config/ngrams.py, and T rows, C = S * D channels, R rows of the table that a token reads, Z
rows of states. Arrays are float32 and contiguous unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.cuda.driver.arrays import Argument, DeviceArray
from engine.cuda.driver.compiler import Module, build
from engine.cuda.driver.launch import launch
from engine.cuda.recurrent.plan import Job, StateShape
from engine.cuda.recurrent.rows import DecodeRows, Rows

_FILES = ("recurrent.cuh", "ngrams.cu")

DECODE_THREADS, THREADS = 128, 256
"""Of a block that chooses rows in decode steps, and of all others."""

MOST_ROWS = 2**31 - 1
"""Rows of a table: they are numbered in 32 bits."""


@dataclass(frozen=True)
class NgramShape(StateShape):
    """What the kernels are built for, and are launched with.

    Attributes:
        length: N. heads: G. taps: W. channels: C. columns: D.
    """

    length: int
    heads: int
    taps: int
    channels: int
    columns: int

    def __post_init__(self) -> None:
        assert self.length >= 2 and self.taps >= 2 and self.channels % self.columns == 0, self

    @property
    def rows(self) -> int:
        """R."""
        return (self.length - 1) * self.heads

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Inputs of the convolution, and 1 + the ids of the last tokens or 0 for none; the oldest come first."""
        return ((self.taps - 1) * self.length, self.channels), (self.length - 1,)

    def build_jobs(self) -> list[Job]:
        """Decode steps and prompts together."""
        return [(_FILES, {"LENGTH": self.length, "GRAMS": self.heads, "TAPS": self.taps})]


@dataclass(frozen=True, eq=False)
class NgramConstants:
    """What the kernels read of the model.

    Attributes:
        numbers: uint64 (N + 2 * R,), multipliers, sizes and offsets. end: the token that ends a sequence.
        norms: (3, C), of keys, queries and inputs. epsilons: theirs. least: magnitude that a gate's root is taken of.
        conv: (C, W), the newest input's last.
    """

    numbers: DeviceArray
    end: int
    norms: DeviceArray
    epsilons: tuple[float, float, float]
    least: float
    conv: DeviceArray


class Ngrams:
    """The kernels of one shape on the current device."""

    def __init__(self, shape: NgramShape) -> None:
        (files, defines), self.shape = shape.build_jobs()[0], shape
        self._module: Module = build(files, defines=defines)
        self._blocks = -(-shape.channels // THREADS)

    def choose(
        self, rows: Rows, tokens: DeviceArray, kept: NgramConstants, known: DeviceArray, out: DeviceArray
    ) -> None:
        """The rows of the table that tokens read. Decode steps keep the tokens at once, prompts with keep().

        Args:
            rows: of the step; rows with position -1 get -1.
            tokens: int32 (T,).
            kept: see NgramConstants.
            known: (Z, N - 1), the second of the states.
            out: int32 (T, R), written.
        """
        assert known.shape[1:] == self.shape.state_shapes[1] and out.shape[1] == self.shape.rows
        before: tuple[Argument, ...] = (tokens, kept.numbers, np.uint64(kept.end), known)
        if isinstance(rows, DecodeRows):
            assert min(len(tokens), len(out)) >= rows.count and rows.fit(known)
            args = (*before, rows.places, rows.positions, rows.offsets, out)
            launch(self._module.get("ngram_rows_decode"), rows.count, DECODE_THREADS, args)
        elif len(rows.tiles):
            args = (*before, rows.spans, rows.tiles, out)
            launch(self._module.get("ngram_rows_prompt"), len(rows.tiles), THREADS, args)

    def gate(self, products: DeviceArray, kept: NgramConstants, x: DeviceArray, inputs: DeviceArray) -> None:
        """x (T, C) += gates times values, and inputs (T, C) = their norm. products (T, C + D): keys, then the value."""
        shape = self.shape
        assert x.shape[1] == inputs.shape[1] == shape.channels and products.shape[1] == shape.channels + shape.columns
        args = (products, shape.columns, kept.norms, *kept.epsilons, kept.least, x, inputs)
        grid = len(products), shape.channels // shape.columns
        launch(self._module.get("ngram_gate"), grid, THREADS, args)

    def convolve(
        self, rows: Rows, inputs: DeviceArray, kept: NgramConstants, past: DeviceArray, x: DeviceArray
    ) -> None:
        """x (T, C) += silu of the convolution of inputs (T, C), which decode steps keep at once, prompts with keep().

        Args:
            rows: of the step; rows that it does not name, or with position -1, stay as they are.
            inputs: what gate() gave.
            kept: see NgramConstants.
            past: (Z, (W - 1) * N, C), the first of the states.
            x: changed in place.
        """
        shape = self.shape
        assert past.shape[1:] == shape.state_shapes[0] and x.shape[1] == inputs.shape[1] == shape.channels
        before: tuple[Argument, ...] = (inputs, kept.conv, shape.channels, past)
        if isinstance(rows, DecodeRows):
            assert min(len(inputs), len(x)) >= rows.count and rows.fit(past)
            args = (*before, rows.places, rows.positions, rows.offsets, x)
            launch(self._module.get("ngram_conv_decode"), (self._blocks, rows.count), THREADS, args)
        elif len(rows.tiles):
            args = (*before, rows.spans, rows.tiles, x)
            launch(self._module.get("ngram_conv_prompt"), (self._blocks, len(rows.tiles)), THREADS, args)

    def keep(self, rows: Rows, tokens: DeviceArray, inputs: DeviceArray, past: DeviceArray, known: DeviceArray) -> None:
        """Of prompts, the states behind every span; arguments as above. A span may write the row that it reads."""
        if not isinstance(rows, DecodeRows) and len(rows.spans):
            args = (tokens, inputs, self.shape.channels, known, past, rows.spans)
            launch(self._module.get("ngram_keep"), (self._blocks, len(rows.spans)), THREADS, args)
