"""All activations on the device, with their shapes; nothing else allocates while the engine runs."""

from __future__ import annotations

import numpy as np

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.launch_plan.arrays import activation_arrays
from engine.cuda.launch_plan.families import Phase
from engine.cuda.launch_plan.model import LaunchPlan


class Activations:
    """Buffers of R rows of a phase, allocated as launch_plan.arrays lists them. All C-contiguous, float32 if not said.

    Attributes:
        x: (R, D) residual stream. qkv: (R, widest q+k+v). attention: (R, H*Hv). up: (R, F).
        gate: (R, F) at least; also the operand of the down projection, from products of gemm.cu.
        y: (R, D) output of one expert. total: (R, D) sum over experts.
        router: (R, n_scores) scores. mix: (R, 1) score of a shared expert apart from the others.
        chosen: int32 (R, U) experts of each row, those of every row included; chosen_weights: (R, U).
        hidden: (R, U * F), of decode steps.
        embedded: embeddings of the rows. layer_inputs: vectors of every layer's own; layer_projected: what becomes part
            of them. streams, predicted: of a stream of several vectors. stream_gates, skip: of residual connections,
            see Widths. latent: what experts read, then what they give. given: what adjugate experts read. One column
            without them.
        normed, part, beside, inputs, index_inputs, index_queries, kept, queries, heads: see Widths; one column where no
            part needs them.
        mixed, convolved, between, scanned: of recurrent layers and tables of n-grams, see Widths; else one column.
        chunked: of recurrent layers whose prompts go in chunks, see Widths; of prompts.
        operand: bytes of the input of one product of prompts, as its kernels read it.
        expert_room: scratch memory of experts, allocated with the prompts' buffers; None where no family needs it.
        batch_operand: scratch memory of DECODE_GEMM and STEP_GEMM.
        stream_operand: x as such products read it, left by the one before.
        operand_words: int32, zeros between launches: how far an operand is that DECODE_GEMM leaves by halves.
    """

    x: DeviceArray
    y: DeviceArray
    total: DeviceArray
    qkv: DeviceArray
    attention: DeviceArray
    gate: DeviceArray
    up: DeviceArray
    router: DeviceArray
    mix: DeviceArray
    chosen: DeviceArray
    chosen_weights: DeviceArray
    normed: DeviceArray
    part: DeviceArray
    beside: DeviceArray
    inputs: DeviceArray
    index_inputs: DeviceArray
    index_queries: DeviceArray
    kept: DeviceArray
    embedded: DeviceArray
    layer_inputs: DeviceArray
    layer_projected: DeviceArray
    streams: DeviceArray
    predicted: DeviceArray
    stream_gates: DeviceArray
    skip: DeviceArray
    latent: DeviceArray
    given: DeviceArray
    queries: DeviceArray
    heads: DeviceArray
    mixed: DeviceArray
    convolved: DeviceArray
    between: DeviceArray
    scanned: DeviceArray
    hidden: DeviceArray | None = None
    chunked: DeviceArray | None = None
    operand: DeviceArray | None = None
    expert_room: DeviceArray | None = None
    batch_operand: DeviceArray | None = None
    stream_operand: DeviceArray | None = None
    operand_words: DeviceArray | None = None

    def __init__(self, plan: LaunchPlan, phase: Phase) -> None:
        import cupy

        self.rows = plan.settings.prefill_rows if phase is Phase.PROMPT else plan.decode_rows
        for name, size in activation_arrays(plan, phase).items():
            make = cupy.empty if size.dtype == "uint8" else cupy.zeros
            setattr(self, name, make(size.shape, np.dtype(size.dtype)))

    @property
    def n_bytes(self) -> int:
        """Device memory held."""
        return sum(int(value.nbytes) for value in vars(self).values() if hasattr(value, "nbytes"))
