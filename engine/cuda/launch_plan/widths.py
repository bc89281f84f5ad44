"""Row widths of a model's activations, from its launch plan."""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.launch_plan.model import LaunchPlan
from engine.cuda.launch_plan.steps import Norm


@dataclass(frozen=True, kw_only=True)
class Widths:
    """The largest over all layers.

    Attributes:
        model: D. vocab: V. qkv: all of q, k and v. attention: H*Hv. ffn: F.
        experts: scores of a router, 0 without a mixture. used: experts of a row. hidden: hidden values of all of them.
        normed: D, or 0 where every norm folds into a product. part: D, or 0 where every result is added as it comes.
        beside: D, or 0 where no layer reads its input again.
        inputs: first products of latent attention. queries: queries from their compression. heads: what the matrices
            of single heads, or kv_b, give. All 0 without latent attention.
        index_inputs, index_queries: products of indexers, of norm(x) and of low-rank queries. 0 without indexers.
        kept: keys and values of layers that later ones read.
        embedded: D, or 0 where no layer reads embeddings. per_layer: vectors of a token for all layers. streams: A * D,
            or 0 without several streams.
        latent: numbers that experts read and give, 0 where these are D. predicted, stream_gates: as streams, or 0 where
            nothing is kept beside them. skip: numbers that residual connections are made of.
        given: D, or 0 where no experts read what others have given.
        mixed: first products of recurrent layers. convolved: channels of their convolutions. between: products between
            the first and the last. scanned: what the last product reads. chunked: what prompts in chunks keep between
            their kernels. All 0 without such layers, or tables of n-grams, which take the first four.
    """

    model: int
    vocab: int
    qkv: int = 0
    attention: int = 0
    ffn: int = 0
    experts: int = 0
    used: int = 0
    hidden: int = 0
    normed: int = 0
    part: int = 0
    beside: int = 0
    inputs: int = 0
    index_inputs: int = 0
    index_queries: int = 0
    kept: int = 0
    queries: int = 0
    heads: int = 0
    mixed: int = 0
    convolved: int = 0
    between: int = 0
    scanned: int = 0
    embedded: int = 0
    per_layer: int = 0
    streams: int = 0
    predicted: int = 0
    stream_gates: int = 0
    skip: int = 0
    latent: int = 0
    given: int = 0
    chunked: int = 0

    @classmethod
    def of(cls, plan: LaunchPlan) -> Widths:
        """The widths of a plan."""
        layers, width = plan.layers, plan.width
        found: dict[str, int] = {}
        for layer in layers:
            for part in (layer.mixer, layer.ffn, layer.ngrams):
                for name, value in ({} if part is None else part.widths()).items():
                    found[name] = max(value, found.get(name, 0))
        skips = [skip for layer in layers for skip in (layer.mixer_skip, layer.ffn_skip) if skip is not None]
        skips += [] if plan.skips is None else [plan.skips.head]
        for skip in skips:
            for name, value in skip.widths(width).items():
                found[name] = max(value, found.get(name, 0))
        if plan.spread is not None:
            found["predicted"] = width * plan.spread.count
        count = 0 if plan.spread is None else plan.spread.count
        if plan.skips is not None:
            count = plan.skips.streams
        norms = [norm for layer in layers for norm in (layer.attn_norm, layer.ffn_norm)] + [plan.output_norm]
        posts = [norm for layer in layers for norm in (layer.attn_post_norm, layer.ffn_post_norm)]
        weighs = any(layer.moe is not None and layer.moe.weigh_input for layer in layers)
        waits = plan.position_embd is not None or any(norm is not Norm.ABSENT for norm in posts) or weighs
        per_layer, lows = 0, [layer.laurel.left.width for layer in layers if layer.laurel is not None]
        if lows:
            found["ffn"] = max(*lows, found.get("ffn", 0))
        if plan.per_layer is not None:
            per_layer = plan.per_layer.model_proj.width
            found["ffn"] = max(plan.per_layer.width, found.get("ffn", 0))
        again = (one.parallel or one.attn_norm_2 or (one.moe is not None and one.moe.reads_input) for one in layers)
        return cls(
            model=width,
            vocab=plan.vocab,
            normed=width if Norm.APART in norms or weighs or lows else 0,
            part=width if waits or per_layer or lows or plan.spread is not None else 0,
            streams=width * count,
            beside=width if any(again) else 0,
            embedded=width if plan.keeps_embeddings else 0,
            per_layer=per_layer,
            **found,
        )

    @property
    def widest(self) -> int:
        """Columns of the widest matrix."""
        attention = self.attention, self.inputs, self.heads
        return max(self.model, self.ffn, *attention, self.convolved, self.between, self.scanned, self.predicted)
