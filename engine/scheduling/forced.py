"""Tokens that follow a drawn one without a choice, because a constraint allows no other: which ones a request takes.

They are known before the model has seen them, so several are fed in one step: as rows of a decode step, or as pieces
(engine/scheduling/pieces.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.request import TokenSample, Work
from engine.runner.protocol import Runner
from engine.sampling.logprobs import certain
from engine.sampling.params import SamplingParams
from engine.scheduling.job import Job
from engine.scheduling.pieces import outputs_before


class ForcedTokens:
    """Forced tokens for one runner.

    Args:
        runner: says from which number on tokens are fed together. Whether some are depends on the text alone, never on
            the batch: on a GPU other kernels compute them, and the text must not depend on its neighbours.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def behind(self, job: Job, item: Work, sample: TokenSample) -> Sequence[int]:
        """The tokens that follow the one that a work item drew; () where fewer are forced than are fed together.

        Raises:
            EngineError: the constraint's state is broken; it concerns this request alone.
        """
        mask, params = item.sequence.mask, job.request.params
        if mask is None or job.assembler.is_end(sample.token_id) or _reports_free(params):
            return ()
        n_before = outputs_before(item)
        room = job.request.max_output - n_before - 1
        if room <= 0:
            return ()
        ids = mask.forced([*item.sequence.output_ids[:n_before], sample.token_id])
        return ids[:room] if ids and 1 + len(ids) >= self._runner.shortest_piece else ()

    def sample_of(self, token_id: int, params: SamplingParams) -> TokenSample:
        """What drawing a forced token would have given."""
        if params.logprobs is None:
            return TokenSample(token_id)
        return certain(token_id, params.logprobs, self._runner.config.vocab_size)


def _reports_free(params: SamplingParams) -> bool:
    """Whether log-probabilities without the constraint are wanted: they take a row of logits for every token."""
    return params.free_logprobs and params.logprobs is not None
