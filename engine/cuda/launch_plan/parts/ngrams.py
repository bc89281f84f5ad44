"""Tables of n-grams in the plan; formulas: engine/model/config/ngrams.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.cuda.launch_plan.products import Chooser, Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Launch, Step
from engine.cuda.recurrent.ngrams.ngrams import NgramShape
from engine.model.weights import LayerWeights


@dataclass(frozen=True)
class NgramPlan:
    """What a layer adds to its input for the last few tokens.

    Attributes:
        table: its rows are vectors. key_value: what is made of the rows that a token reads, side by side.
        shape: the kernels. cache: where the states are among those of the model, behind those of all layers.
    """

    table: Matrix
    key_value: Projection
    shape: NgramShape
    cache: int

    def products(self) -> Iterator[Product]:
        """All products."""
        yield from self.key_value.parts

    def matrices(self) -> Iterator[Matrix]:
        """Everything that is uploaded."""
        yield self.table
        yield from (matrix for product in self.products() for matrix in product.matrices)

    def widths(self) -> dict[str, int]:
        """What it needs of the activations, by the fields of Widths: numbers of rows, vectors, products, inputs."""
        columns, channels = self.key_value.columns, self.shape.channels
        return {"convolved": self.shape.rows, "scanned": columns, "between": self.key_value.width, "mixed": channels}

    def launches(self, step: Step) -> Iterator[Launch]:
        """In order."""
        (job,) = self.shape.build_jobs()
        phase = "prompt" if step.prompts else "decode"
        yield Launch(f"ngram_rows_{phase}", job)
        yield step.embed(self.table)
        yield from step.product(self.key_value)
        yield Launch("ngram_gate", job)
        yield Launch(f"ngram_conv_{phase}", job)
        if step.prompts:
            yield Launch("ngram_keep", job)


def describe_ngrams(layers: Sequence[LayerWeights], width: int, chooser: Chooser) -> list[NgramPlan | None]:
    """The table of each layer; None where it has none. width: D."""
    found: list[NgramPlan | None] = []
    for layer in layers:
        config, weights = layer.config.ngrams, layer.ngrams
        if config is None or weights is None:
            found.append(None)
            continue
        shape = NgramShape(config.length, config.heads, config.conv_width, config.channels, width)
        cache = len(layers) + sum(one is not None for one in found)
        both = chooser.side_by_side([weights.key, weights.value])
        found.append(NgramPlan(Matrix.of(weights.table), both, shape, cache))
    return found
