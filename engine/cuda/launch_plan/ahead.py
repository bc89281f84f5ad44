"""How far decode steps run ahead of the host, and how many recurrent states a slot keeps because of it."""

from __future__ import annotations

AHEAD = 2
"""Steps launched and not yet read, of the row that is least ahead: one runs while the host handles the last result,
one is behind it."""

MOST_AHEAD = AHEAD + 1
"""The same of any row. A row that joined when others were ahead stays behind; one this far ahead skips a step."""

STATE_PLACES = MOST_AHEAD + 2
"""Places of a slot's ring of recurrent states, R: the committed one, one for each step ahead, and one to spare; see
docs/decisions/repeatable-step.md."""
