"""Time mixing and the shift of tokens for tests/cuda/recurrent/test_recurrent_heads.py: random layers, also in numpy.

A row is x, which is shifted, then what the products of a layer give; the result is y, then the shifted inputs.
"""

import numpy as np

from engine.cpu.recurrent.rwkv import DECAY, SHORTEST, corrected_products, decayed_products
from engine.cuda.recurrent.rwkv.rwkv_6 import Rwkv6, Rwkv6Constants, Rwkv6Inputs
from engine.cuda.recurrent.rwkv.rwkv_7 import Rwkv7, Rwkv7Constants, Rwkv7Inputs
from engine.cuda.recurrent.rwkv.token_shift import shift, shift_further

EPSILON, MARKER = 64e-5, np.float32(-777)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class TimeMixCase:
    """What both versions share; `given` are widths of a row behind x."""

    def __init__(self, shape, rng, *given):
        self.shape, d = shape, shape.inner
        self.ends = np.cumsum([d, *given]).tolist()
        self.width, self.inner = self.ends[-1], 3 * d
        self.rng = rng
        self.lerps = self.vector(2, d)
        self.norm, self.bias = (self.vector(d), self.vector(d)) if self.has_norm else (None, None)

    def vector(self, *shape):
        return self.rng.normal(size=shape).astype(np.float32)

    def room(self, memory, rows):
        """What kernels of chunks leave for each other; None for token after token."""
        return memory.up(np.full((rows, self.shape.chunk_width), np.nan, np.float32)) if self.chunks else None

    def parts(self, mixed):
        return [mixed[:, first:end] for first, end in zip(self.ends, self.ends[1:], strict=False)]

    def run(self, memory, rows, mixed, states, out):
        d = self.shape.inner
        lerps, shifted = memory.up(self.lerps), memory.up(np.full((len(mixed), 3 * d), MARKER, np.float32))
        x, change = mixed[:, :d], shifted[:, 2 * d :]
        both = shifted[:, : 2 * d]
        shift(rows, x, lerps, states[0], both, change=change)
        if self.shape.channel_mix:
            shift(rows, x, lerps[:1], states[2], both[:, :d])
        y = memory.up(np.full((len(mixed), d), MARKER, np.float32))
        self.mix(memory, rows, memory.up(memory.down(mixed)), states[1], y)
        out[:, :d], out[:, d:] = y, both

    def expected(self, mixed, states):
        d = self.shape.inner
        x = mixed[:, :d]
        changes = [np.concatenate((state[None], x[:-1])) - x for state in states[::2]]  # channel mixing's comes last
        shifted = [changes[-1] * self.lerps[0] + x, changes[0] * self.lerps[1] + x]
        memory = np.ascontiguousarray(states[1].transpose(0, 2, 1)) if self.keys_first else states[1]
        y, memory = self.time_mix(mixed, memory)
        memory = memory.transpose(0, 2, 1) if self.keys_first else memory
        last = [x[-1], memory, x[-1]] if self.shape.channel_mix else [x[-1], memory]
        return np.concatenate((y.reshape(len(x), d), *shifted), axis=1), last

    def normed(self, y):
        if self.norm is None:
            return y.reshape(len(y), -1)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + EPSILON)
        return y.reshape(len(y), -1) * self.norm + self.bias


class Rwkv6Case(TimeMixCase):
    """Behind x are r, w, k, v and the gate."""

    keys_first = True

    def __init__(self, shape, rng):
        self.has_norm = not shape.linear
        kv = shape.kv_heads * shape.head
        super().__init__(shape, rng, shape.inner, shape.inner, kv, kv, shape.inner)
        self.first = None if shape.linear else self.vector(shape.inner)

    def mix(self, memory, rows, mixed, state, out):
        small = (None if one is None else memory.up(one) for one in (self.first, self.norm, self.bias))
        inputs, constants = Rwkv6Inputs(*self.parts(mixed)), Rwkv6Constants(*small, EPSILON)
        Rwkv6(self.shape)(rows, inputs, constants, state, out, chunked=self.room(memory, len(mixed)))

    def time_mix(self, mixed, memory):
        s = self.shape
        r, w, k, v, gate = self.parts(mixed)
        w = np.exp(-np.exp(w))
        r, w = (one.reshape(len(r), s.heads, s.head) for one in (r, w))
        k, v = (np.repeat(one.reshape(len(r), s.kv_heads, s.head), s.heads // s.kv_heads, axis=1) for one in (k, v))
        if s.linear:
            k, r = k - k * w, r / np.float32(s.head**0.5)
        first = None if s.linear else self.first.reshape(s.heads, s.head)
        y, memory = decayed_products(r, w, k, v, first, memory)
        return self.normed(y) * sigmoid(gate) * (1 if s.linear else gate), memory


class Rwkv7Case(TimeMixCase):
    """Behind x are r, w, k, v, a, f, the gate, the first layer's values and room for u; odd heads have no f."""

    keys_first = False

    def __init__(self, shape, rng):
        self.has_norm = shape.heads != 2
        super().__init__(shape, rng, *[shape.inner] * 9)
        self.k_k, self.k_a, self.r_k = (self.vector(shape.inner) for _ in range(3))

    def mix(self, memory, rows, mixed, state, out):
        arrays = (self.k_k, self.k_a, self.r_k, self.norm, self.bias)
        small = (None if one is None else memory.up(one) for one in arrays)
        *given, f, gate, first, u = self.parts(mixed)
        inputs = Rwkv7Inputs(*given, f if self.takes else None, gate if self.has_norm else None, u)
        constants = Rwkv7Constants(*small, EPSILON)
        Rwkv7(self.shape)(rows, inputs, constants, first, state, out, chunked=self.room(memory, len(mixed)))

    @property
    def takes(self):
        return self.shape.heads % 2 == 0

    def time_mix(self, mixed, memory):
        s, apart = self.shape, (len(mixed), self.shape.heads, self.shape.head)
        r, w, k, v, a, f, gate, first, _ = self.parts(mixed)
        w, a = np.exp(DECAY * sigmoid(w)), sigmoid(a)
        v = v + (first - v) * sigmoid(f) if self.takes else v
        removed = (k * self.k_k).reshape(apart)
        removed = removed / np.maximum(np.sqrt((removed * removed).sum(-1, keepdims=True)), SHORTEST)
        k = k + (a - 1) * k * self.k_a
        r, w, k, v, a = (np.ascontiguousarray(one.reshape(apart)) for one in (r, w, k, v, a))
        y, memory = corrected_products(r, w, k, v, removed, a, memory)
        given = (r * k * self.r_k.reshape(s.heads, s.head)).sum(-1, keepdims=True) * v
        y = self.normed(y) + given.reshape(len(mixed), -1)
        return y * gate if self.has_norm else y, memory


def checked_further(memory):
    """shift_further on random rows: what it gives, and what is expected."""
    rng = np.random.default_rng(0)
    x, change, lerps, out = (
        rng.normal(size=shape).astype(np.float32) for shape in ((3, 40), (3, 40), (5, 40), (3, 200))
    )
    both = memory.up(np.concatenate((change, out), axis=1))
    shift_further(memory.up(x), both[:, :40], memory.up(lerps), both[:, 40:])
    expected = x[:, None] + change[:, None] * (lerps + out.reshape(3, 5, 40))
    return memory.down(both)[:, 40:], expected.reshape(3, 200)
