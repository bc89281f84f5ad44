"""Random numbers: Philox-4x32-10, the same on every device.

Counter based: the number for a token depends only on the seed and on how many tokens came before it in the output,
never on what else runs. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import secrets

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
UNIFORM_BITS = 24


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit random words of a 128-bit counter under a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0 = MULTIPLIERS[0] * c0
        p1 = MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0 = (k0 + WEYL[0]) & MASK
        k1 = (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def uniform24(seed: int, output_index: int) -> int:
    """The random number of one output token as an integer of 24 bits; divided by 2**24 it is uniform in [0, 1).

    Args:
        seed: 0 to 2**64 - 1.
        output_index: 0 for the first generated token.
    """
    words = philox((output_index & MASK, 0, 0, 0), (seed & MASK, (seed >> 32) & MASK))
    return words[0] >> (32 - UNIFORM_BITS)


def fresh_seed() -> int:
    """A random seed, from the operating system."""
    return secrets.randbits(64)
