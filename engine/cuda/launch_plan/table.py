"""The launch plan as rows of text, for people: which kernels multiply which tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import groupby

from engine.cuda.launch_plan.families import Families, Phase
from engine.cuda.launch_plan.model import LaunchPlan
from engine.cuda.launch_plan.parts.mixture import MoePlan
from engine.cuda.launch_plan.products import Product


@dataclass(frozen=True)
class LaunchRow:
    """One product in layers that are alike.

    Attributes:
        layers: "0-31", or "" outside the layers.
        tensors: names without layer and suffix.
        types: on the device. shape: outputs x inputs of all matrices; "pairs" where gate and up are interleaved.
        decode: families of decode steps with the first number of rows of each. prompts: family of prompts.
    """

    layers: str
    tensors: str
    types: str
    shape: str
    decode: str
    prompts: str

    def as_dict(self) -> dict[str, str]:
        """All fields, for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def launch_rows(plan: LaunchPlan) -> list[LaunchRow]:
    """Every product of a plan; neighbouring layers with the same products share rows."""
    layers = [tuple(_rows_of_layer(plan, index)) for index in range(len(plan.layers))]
    found: list[LaunchRow] = []
    first = 0
    for rows, run in groupby(layers):
        last = first + len(list(run)) - 1
        name = str(first) if first == last else f"{first}-{last}"
        found += [LaunchRow(name, *row) for row in rows]
        first = last + 1
    head = () if plan.output is None else plan.output.parts
    return found + [LaunchRow("", *_cells(product, product.families)) for product in head]


def launch_table(rows: list[LaunchRow]) -> str:
    """Rows in columns."""
    cells = [tuple(field.name for field in fields(LaunchRow)), *(astuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _rows_of_layer(plan: LaunchPlan, index: int) -> Iterator[tuple[str, str, str, str, str]]:
    layer = plan.layers[index]
    latent = None if layer.attention is None else layer.attention.latent
    stacks = [] if latent is None else [heads for heads in (latent.k_b, latent.v_b) if heads is not None]
    heads = {one.single: one.families for one in stacks}
    for product in () if layer.mixer is None else layer.mixer.products():
        yield _cells(product, heads.get(product, product.families))
    if not isinstance(layer.ffn, MoePlan):
        for product in () if layer.ffn is None else layer.ffn.products():
            yield _cells(product, product.families)
        return
    moe = layer.ffn
    yield _cells(moe.router.parts[0], _router_families(moe))
    experts = [product for product in (moe.gate_up, moe.down) if product is not None]
    for product in experts or moe.expert.products():
        yield _cells(product, moe.families)
    shared = () if moe.shared is None else moe.shared.products()
    for product in (*shared, *(() if moe.shared_gate is None else moe.shared_gate.parts)):
        yield _cells(product, product.families)


def _router_families(moe: MoePlan) -> Families:
    router = moe.router.parts[0].families
    firsts = sorted({first for first, _ in (*router.decode, *moe.families.decode)})
    scores = [(first, moe.score_family(first, Phase.DECODE)) for first in firsts]
    changes = [one for one, before in zip(scores, [(0, None), *scores], strict=False) if one[1] is not before[1]]
    return Families(router.prompt, tuple(changes))


def _cells(product: Product, families: Families) -> tuple[str, str, str, str, str]:
    names = [name for one in product.matrices for name in one.tensors]
    tensors = " ".join(dict.fromkeys(_short(name) for name in names))
    types = " ".join(dict.fromkeys(type.name for type in product.types))
    outputs = sum(one.rows for one in product.matrices)
    count = product.matrices[0].count
    shape = f"{f'{count} x ' if count > 1 else ''}{outputs}{' pairs' if product.paired else ''} x {product.columns}"
    parts = [f"{family.value} from {first}" if first > 1 else family.value for first, family in families.decode]
    decode = ", ".join(parts)
    prompts = "" if families.prompt is None else families.prompt.value
    return tensors, types, shape, decode, prompts


def _short(name: str) -> str:
    """blk.3.attn_q.weight[0:64] -> attn_q[0:64]."""
    plain, bracket, rest = name.partition("[")
    pieces = plain.split(".")
    return ".".join(pieces[2:-1] if pieces[0] == "blk" else pieces[:-1]) + bracket + rest
