"""A pretended card on which the cache is real: the kernels that write keys and values, or read them, run on checksums.

A cached position holds the checksum of its token and position; the next token is a function of all positions that a row
may see, read through the table that its launch was given. So a position that is missing, stale or of another sequence
gives another text. Products and everything else are only written down.
"""

from dataclasses import dataclass

import numpy as np

from engine.config import PAGE
from tests.support.gpu.state_gpu import StateGpu, drawn, fold


def cell(token, position):
    """What a position holds."""
    return fold(fold(0, token), position)


def expected(prompt, n, n_layers, forced=lambda output_ids: ()):
    """(token, log-probability) of the n tokens behind a prompt; those that are forced have log-probability 0."""
    cells, found = [cell(token, position) for position, token in enumerate(prompt)], []
    while len(found) < n:
        state = 0
        for one in cells:
            state = fold(state, one)
        found.append(drawn([state] * n_layers))
        found += [(token, 0.0) for token in forced([token for token, _ in found])]
        for token, _ in found[len(cells) - len(prompt) :]:
            cells.append(cell(token, len(cells)))
    return found[:n]


@dataclass
class CacheGpu(StateGpu):
    """See the module.

    Attributes:
        steps: rows with a token of every decode step that attend to all positions.
        chosen: rows that attended to chosen positions.
    """

    def __post_init__(self):
        super().__post_init__()
        self.steps, self.chosen = [], 0

    def ran(self, name, grid, args):
        super().ran(name, grid, args)
        if name.startswith("embed_"):
            self._tokens = args[4]

    def _run_take_rows(
        self, grid, counts, chosen, known, most, tokens, positions, table, width, to_tokens, to_positions, to_table
    ):
        slots, n_known = counts.tolist()
        to_positions[: grid[0]] = -1
        for row in range(grid[0]):
            if row < slots:
                slot = chosen[row]
                token, position = tokens[slot], positions[slot]
            elif row < slots + n_known:
                token, position, slot = known[:, row - slots]
            else:
                continue
            to_tokens[row], to_positions[row] = token, position
            if position >= 0:
                used = position // PAGE + 1
                to_table[row] = -7  # no page: what is behind is never read
                to_table[row, :used] = table[slot, :used]

    def _run_rope_append(self, grid, qkv, bias, keys, values, table, width, sequence, positions, *rest):
        for row, position in enumerate(positions.tolist()):
            if position >= 0:
                self._cells(keys)[table[sequence[row], position // PAGE], position % PAGE] = cell(
                    self._tokens[row], position
                )

    def _run_attention_decode(self, grid, qkv, keys, values, table, width, positions, n, *rest):
        self.steps.append(sum(position >= 0 for position in positions[:n].tolist()))
        for row in reversed(range(n)):  # what a row before it writes now, it must not need
            position = int(positions[row])
            if position < 0:
                continue
            state = fold(self._seen(keys, table[row], position), new := cell(self._tokens[row], position))
            self._behind.setdefault(row, []).append(state)
            page = table[row, position // PAGE]
            if page >= 0:
                self._cells(keys)[page, position % PAGE] = new

    def _run_attention_prefill(self, grid, qkv, keys, values, table, width, tiles, *rest):
        for first, n_rows, sequence, position in tiles.tolist():
            for row in range(n_rows):
                self._behind.setdefault(first + row, []).append(self._seen(keys, table[sequence], position + row + 1))

    # Of a row that chooses, the scores are made of all keys of its indexer, and attention may read all that is cached.

    def _run_index_append(self, grid, keys, row, cache, table, width, sequence, positions, limit, whole, choosing):
        for i, position in enumerate(positions.tolist()):
            whole[i], choosing[i] = (position, -1) if position < limit else (-1, position)
            if position >= 0 and table[sequence[i], position // PAGE] >= 0:
                page = table[sequence[i], position // PAGE]
                self._cells(cache)[page, position % PAGE] = cell(self._tokens[i], position)

    def _run_index_scores(
        self, grid, q, q_row, weights, weights_row, factor, cache, table, width, sequence, positions, scores, most
    ):
        for i, position in enumerate(positions.tolist()):
            if position >= 0:
                self._word(scores[i])[0] = self._seen(cache, table[sequence[i]], position + 1)

    def _run_index_choose(self, grid, scores, most, positions, local, count, chosen):
        for i, position in enumerate(positions.tolist()):
            if position >= 0:
                self._word(chosen[i])[0] = self._word(scores[i])[0]

    def _run_attention_chosen(self, grid, qkv, keys, values, table, width, sequence, positions, chosen, *rest):
        for i, position in enumerate(positions.tolist()):
            if position >= 0:
                state = self._seen(keys, table[sequence[i]], position + 1)
                assert state == int(self._word(chosen[i])[0]), "a choice of another row, or from other keys"
                self.chosen += 1
                self._behind.setdefault(i, []).append(state)

    @staticmethod
    def _word(row):
        return np.asarray(row).reshape(-1).view(np.uint32)

    def _seen(self, keys, pages, n):
        """The checksum of positions 0 .. n - 1 of a sequence."""
        state, cells = 0, self._cells(keys)
        for position in range(n):
            page = pages[position // PAGE]
            assert page >= 0, "a position without a page is read"
            state = fold(state, cells[page, position % PAGE])
        return state

    @staticmethod
    def _cells(keys):
        """One word of every position of a layer's keys, or of its indexer's: (pages, PAGE)."""
        words = np.asarray(keys).view(np.uint32)
        return words[:, 0, :, 0] if words.ndim == 4 else words[:, :, 0]
