"""The launch plan of a whole model, and the launches of its steps in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.concurrency.lazy import lazy
from engine.config import KvType, step_sizes
from engine.cuda.attention import step_rows
from engine.cuda.attention.attention_shape import AttentionShape
from engine.cuda.attention.cache import LayerShape
from engine.cuda.compressed.plan import BlockShape
from engine.cuda.driver import staging
from engine.cuda.launch_plan.costs import Cost, cost_of, rows_of_turns
from engine.cuda.launch_plan.families import Card, Family, Phase
from engine.cuda.launch_plan.layer import (
    LayerPlan,
)
from engine.cuda.launch_plan.parts.indexer import IndexerPlan
from engine.cuda.launch_plan.parts.skips import SkipsPlan
from engine.cuda.launch_plan.parts.streams import PerLayerPlan, SpreadPlan
from engine.cuda.launch_plan.products import Matrix, Product, Projection
from engine.cuda.launch_plan.steps import Launch, Norm, Step
from engine.cuda.matrix import gemm_plan
from engine.cuda.recurrent.plan import StateShape
from engine.cuda.rows import pooling
from engine.cuda.rows.activation import KernelActivation
from engine.cuda.sampling import sampler
from engine.gguf.types import GGMLType

REFERENCE_CARD = Card(90, 132)
"""An H100 or H200: what is planned for where no card is there to ask."""


KNOWN_ROWS, KNOWN_ROWS_PER_SLOT = 64, 15
"""Rows of a decode step beside its slots, for known tokens of their sequences: at most so many, and of each slot. One
slot fills a step of 16 rows, four fill one of 64."""

LEAST_KNOWN = 8
"""Rows of the smallest such step: fewer would take as long, and each number of rows is captured on its own."""


@dataclass(frozen=True)
class Settings:
    """What launches depend on beside the model and the card.

    Attributes:
        kv_type: number format of the cache.
        max_sequences: slots.
        prefill_rows: most rows of a batch of prompts.
        deterministic: a row's bits depend on its own sequence alone, also where that costs speed.
        throughput: many sequences together matter, not one alone.
    """

    kv_type: KvType
    max_sequences: int
    prefill_rows: int
    deterministic: bool = False
    throughput: bool = False


@dataclass(frozen=True)
class LaunchPlan:
    """A model on a card.

    Attributes:
        card: the GPU. settings: see Settings.
        width: D. vocab: V.
        token_embd: the embedding table. position_embd: learned positions, or None.
        embedding_norm: whether there is one.
        layers: the layers in order.
        output_norm: where it is computed. output: the output projection; None in models that make embeddings alone, of
            which only texts() runs.
        softcap: whether logits are capped.
        token_types: whether a vector of their type is added to tokens.
        per_layer: the vectors of tokens for each layer, or None. spread: several streams, or None.
        silent: whether some tokens are never given.
        skips: residual connections between streams, or None.
    """

    card: Card
    settings: Settings
    width: int
    vocab: int
    token_embd: Matrix
    position_embd: Matrix | None
    embedding_norm: bool
    layers: tuple[LayerPlan, ...]
    output_norm: Norm
    output: Projection | None
    softcap: bool
    token_types: bool
    per_layer: PerLayerPlan | None = None
    silent: bool = False
    spread: SpreadPlan | None = None
    skips: SkipsPlan | None = None

    @property
    def keeps_embeddings(self) -> bool:
        """Whether later layers read embeddings."""
        return any(layer.embedding_skip for layer in self.layers)

    @property
    def generates(self) -> bool:
        """Whether there are logits, and so decode steps."""
        return self.output is not None

    @lazy
    def attention_shapes(self) -> tuple[AttentionShape | None, ...]:
        """The heads of every layer; None where it has no attention."""
        mixers = (layer.attention for layer in self.layers)
        return tuple(None if mixer is None else mixer.shape for mixer in mixers)

    @lazy
    def cache_shapes(self) -> tuple[LayerShape | None, ...]:
        """What every layer caches; None where it has no cache of its own."""
        mixers = [layer.attention or layer.compressed for layer in self.layers]
        pairs = enumerate(zip(mixers, self.cache_layers, strict=True))
        return tuple(None if one is None or owner != index else one.cache_shape for index, (one, owner) in pairs)

    @lazy
    def indexers(self) -> tuple[IndexerPlan, ...]:
        """The indexers of all layers that have one, their own or another's."""
        found = (None if layer.attention is None else layer.attention.indexer for layer in self.layers)
        return tuple(one for one in found if one is not None)

    @lazy
    def block_shapes(self) -> tuple[BlockShape, ...]:
        """The kernels of layers with compressed blocks, each once."""
        found = (layer.compressed.shape for layer in self.layers if layer.compressed is not None)
        return tuple(dict.fromkeys(found))

    @lazy
    def cache_layers(self) -> tuple[int, ...]:
        """For every layer the one whose cache it reads."""
        found = (None if layer.attention is None else layer.attention.cache_layer for layer in self.layers)
        return tuple(index if owner is None else owner for index, owner in enumerate(found))

    @lazy
    def state_shapes(self) -> tuple[StateShape | None, ...]:
        """The recurrent state of every layer, None where it has none; then those of tables of n-grams."""
        mixers = (layer.recurrent for layer in self.layers)
        tables = (layer.ngrams.shape for layer in self.layers if layer.ngrams is not None)
        return (*(None if mixer is None else mixer.shape for mixer in mixers), *tables)

    @lazy
    def known_rows(self) -> int:
        """Rows beside the slots. Rows of one sequence have its recurrent states one after the other: then none."""
        if not self.generates or any(self.state_shapes):
            return 0
        return min(KNOWN_ROWS, KNOWN_ROWS_PER_SLOT * self.settings.max_sequences)

    @lazy
    def decode_rows(self) -> int:
        """Most rows of a decode step."""
        return self.settings.max_sequences + self.known_rows

    @lazy
    def known_sizes(self) -> tuple[int, ...]:
        """Numbers of rows of decode steps that have rows beside the slots, ascending."""
        return tuple(size for size in step_sizes(self.decode_rows) if size >= LEAST_KNOWN) if self.known_rows else ()

    def known_room(self, n: int, wanted: int) -> int:
        """See runner.protocol.KnownRoom: as many as make a row of the step cheapest."""
        most = min(wanted, self.known_rows)
        fills = (size - n for size in self.known_sizes if 0 < size - n < most)
        return max((0, *fills, most), key=lambda known: (n + known) / self.step_cost(n + known))

    @lazy
    def step_cost(self) -> Cost:
        """What a decode step of so many rows costs beside others."""
        mixture = any(layer.moe is not None for layer in self.layers)
        return cost_of(step_sizes(self.decode_rows), mixture=mixture, deterministic=self.settings.deterministic)

    @lazy
    def turns(self) -> tuple[int, ...]:
        """By number of slots that could run: how many a step takes; see costs.rows_of_turns.

        All of them where few rows more never cost much: on cards whose products have a few rows a launch. And where
        sequences have recurrent states, which are kept by slot.
        """
        slots = self.settings.max_sequences
        if not self.known_rows or self.card.arch != gemm_plan.ARCH:
            return tuple(range(slots + 1))
        return rows_of_turns(step_sizes(slots), slots, self.step_cost)

    @lazy
    def products(self) -> tuple[Product, ...]:
        """All products; of experts and heads that are alike, one."""
        head = () if self.output is None else self.output.parts
        first = [] if self.per_layer is None else [*self.per_layer.model_proj.parts]
        first += [] if self.spread is None else self.spread.products()
        first += [] if self.skips is None else self.skips.head.products()
        return (*first, *(product for layer in self.layers for product in layer.products()), *head)

    @lazy
    def matrices(self) -> tuple[Matrix, ...]:
        """Everything that is uploaded, each tensor once."""
        found = [self.token_embd, *(() if self.position_embd is None else (self.position_embd,))]
        if self.per_layer is not None:
            found += self.per_layer.matrices()
        if self.spread is not None:
            found += self.spread.matrices()
        if self.skips is not None:
            found += self.skips.head.matrices()
        found += [matrix for layer in self.layers for matrix in layer.matrices()]
        found += [matrix for part in (() if self.output is None else self.output.parts) for matrix in part.matrices]
        return tuple(dict.fromkeys(found))

    @lazy
    def gemm_types(self) -> tuple[GGMLType, ...]:
        """Tensor types of the model where PREFILL_GEMM multiplies, else ()."""
        if not any(product.families.prompt is Family.PREFILL_GEMM for product in self.products):
            return ()
        return tuple(sorted({type for product in self.products for type in product.types}, key=lambda type: type.value))

    @lazy
    def gemm_activations(self) -> tuple[KernelActivation, ...]:
        """Activations of gated products of PREFILL_GEMM; the first also serves products without one."""
        gated = (one for one in self.products if one.paired and one.families.prompt is Family.PREFILL_GEMM)
        return tuple(sorted({product.activation for product in gated})) or (KernelActivation.NONE,)

    @lazy
    def step_families(self) -> frozenset[Family]:
        """Families of products that some decode step takes."""
        return frozenset(
            family
            for product in self.products
            for first, family in product.families.decode
            if first <= self.decode_rows
        )

    @lazy
    def dense(self) -> bool:
        """Whether cuBLAS multiplies something."""
        return any(product.families.prompt is Family.DENSE for product in self.products)

    @lazy
    def fixed_rows(self) -> bool:
        """Whether cuBLAS multiplies whole pieces of rows, so that a row's bits do not depend on the others."""
        return self.settings.deterministic or self.card.arch == gemm_plan.ARCH

    @property
    def output_takes_left(self) -> bool:
        """Whether the output projection reads what the last layer has left."""
        return bool(self.layers) and self.layers[-1].leaves_behind

    def expert_room(self) -> int:
        """Bytes of scratch memory of the experts of prompts and decode steps, one at a time."""
        rows = self.settings.prefill_rows, self.decode_rows
        return max((layer.moe.room_bytes(*rows) for layer in self.layers if layer.moe is not None), default=0)

    # ---- launches --------------------------------------------------------------------------------------------

    def step(self, phase: Phase, n_rows: int) -> Step:
        """A step of so many rows."""
        return Step(
            phase,
            n_rows,
            self.card,
            self.decode_rows,
            self.gemm_types,
            self.gemm_activations[0],
            self.fixed_rows,
        )

    @lazy
    def narrows(self) -> bool:
        """Whether of prompts the rows that draw no token can end in the middle of the last layer."""
        return self.skips is None and self.spread is None and self.layers[-1].narrows

    def hidden(self, step: Step, wanted: int | None = None) -> Iterator[Launch]:
        """From token ids to the residual stream behind the last layer.

        wanted: of how many rows it is wanted, fewer than all, where the plan narrows; None: of all.
        """
        yield replace(step.embed(self.token_embd), brick="embed")
        if self.token_types:
            yield replace(step.row("add_bias"), brick="embed")
        if self.position_embd is not None:
            yield replace(step.embed(self.position_embd), brick="embed")
            yield replace(step.row("add_scaled"), brick="embed")
        if self.embedding_norm:
            yield replace(step.part("normalize_pieces"), brick="embed")
        if self.keeps_embeddings:
            yield replace(step.row("copy_rows"), brick="embed")
        if self.per_layer is not None:
            for launch in self.per_layer.launches(step):
                yield replace(launch, brick="embed")
        if self.spread is not None:
            for launch in self.spread.begin(step):
                yield replace(launch, brick="embed")
        if self.skips is not None:
            for launch in self.skips.begin():
                yield replace(launch, brick="embed")
        for layer in self.layers:
            if wanted is not None and layer is self.layers[-1]:
                yield from layer.narrowed(step, wanted)
            else:
                yield from layer.launches(step)
        if self.skips is not None:
            for launch in self.skips.head.read(step):
                yield replace(launch, brick="head")
        if self.spread is not None:
            for launch in self.spread.end(step):
                yield replace(launch, brick="head")

    def head(self, step: Step) -> Iterator[Launch]:
        """From rows of the residual stream to logits."""
        assert self.output is not None, "this model makes embeddings alone"
        ready = self.output_takes_left and step.hands_over
        launches = [*step.norm(self.output_norm), *step.product(self.output, ready=ready)]
        if self.softcap:
            launches.append(step.part("softcap"))
        if self.silent:
            launches.append(step.part("silence"))
        yield from (replace(launch, brick="head") for launch in launches)

    def decode(self, n_rows: int) -> Iterator[Launch]:
        """A decode step over so many slots."""
        yield from self.forward(self.step(Phase.DECODE, n_rows))
        yield Launch("sample", sampler.job(sampler.threads(n_rows)), brick="sample")

    def known(self, n_rows: int) -> Iterator[Launch]:
        """A decode step of so many rows, some of them beside the slots, without its sampling."""
        yield Launch("take_rows", (step_rows.FILES, step_rows.DEFINES), brick="embed")
        yield from self.forward(replace(self.step(Phase.DECODE, n_rows), appends_first=True))

    def chosen(self, n_rows: int) -> Iterator[Launch]:
        """A decode step over so many slots that are not the first ones."""
        yield Launch("take_rows", (step_rows.FILES, step_rows.DEFINES), brick="embed")
        yield from self.decode(n_rows)

    def forward(self, step: Step) -> Iterator[Launch]:
        """A decode step without its sampling."""
        yield from self.hidden(step)
        yield from self.head(step)

    def prompt(self, n_rows: int, outputs: int | None) -> Iterator[Launch]:
        """A batch of prompts in which so many sequences draw their first token; None: up to the stream of every row."""
        yield Launch("scatter", (staging.FILES, None), brick="staging")
        wanted = outputs if self.narrows and outputs is not None and outputs < n_rows else None
        yield from self.hidden(self.step(Phase.PROMPT, n_rows), wanted)
        if outputs:
            if wanted is None:
                yield Launch("gather_rows", (staging.FILES, None), brick="head")
            yield from self.head(self.step(Phase.PROMPT, outputs))
            yield Launch("scatter", (staging.FILES, None), brick="sample")
            yield Launch("sample", sampler.job(sampler.threads(outputs)), brick="sample")

    def texts(self, n_rows: int) -> Iterator[Launch]:
        """Texts of so many tokens together, from their tokens to one vector each."""
        yield Launch("scatter", (staging.FILES, None), brick="staging")
        yield from self.hidden(self.step(Phase.PROMPT, n_rows))
        if self.output_norm is not Norm.ABSENT:
            yield replace(self.step(Phase.PROMPT, n_rows).part("normalize_pieces"), brick="head")
        yield Launch("pool_rows", (pooling.FILES, None), brick="head")
