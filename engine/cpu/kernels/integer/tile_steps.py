"""The innermost steps of tiles on processors with 16 vector registers, in assembler.

Eight sums, the weights of two panels and what multiplies them take all of the registers. LLVM moves loads and
multiplications to where it thinks best, and then keeps some of the sums in memory.
"""

from collections.abc import Sequence

from llvmlite import ir

from engine.cpu.kernels.emit import I64, Emitter, Value
from engine.cpu.kernels.isa import BYTES, V16, V32, Isa

PANELS, TOKENS = 2, 4
"""Panels and tokens of a tile."""

_SUMS = PANELS * TOKENS
_WEIGHTS = range(_SUMS, _SUMS + PANELS)
_OTHERS = range(_SUMS + PANELS, 16)


def step_sums(
    e: Emitter,
    isa: type[Isa],
    places: tuple[Sequence[Value], Sequence[Value]],
    steps: range,
    *,
    starts: Sequence[Value] = (),
    factors: Sequence[Value] = (),
) -> list[list[Value]]:
    """Accumulators [panel][token] of some steps; with factors numbers of 32 bits.

    Args:
        e: where the instructions go.
        isa: has mnemonics.
        places: where each panel's vector of step 0 is, the other steps behind it, and each token's first four bytes.
        steps: of the group.
        starts: what the sums of each token begin with, or nothing for 0.
        factors: of each panel: the products of a step are multiplied by it and widened before they are added.
    """
    assert isa.mnemonics is not None
    multiply, add = isa.mnemonics
    kind, add = (V32, "vpaddd") if factors else (isa.accumulator, add)
    at = [f"${_SUMS + number}" for number in range(PANELS + TOKENS)]
    others = _OTHERS[: len(_OTHERS) - len(factors)]
    held = _OTHERS[len(others) :]
    lines: list[str] = []
    waiting: list[str] = []  # what follows the multiplications of a token is written behind those of the next one
    free = 0
    for step in steps:
        first = step == steps[0]
        lines += [f"vmovdqa {BYTES * step}({at[panel]}), %ymm{register}" for panel, register in enumerate(_WEIGHTS)]
        for token in range(TOKENS):
            sums = range(token, _SUMS, TOKENS)
            products = [others[(free + panel) % len(others)] for panel in range(PANELS)]
            free += PANELS
            new = products
            if first and not starts and not factors:
                new = list(sums)
            lines.append(f"vpbroadcastd {4 * step}({at[PANELS + token]}), %ymm{products[-1]}")
            lines += [
                f"{multiply} %ymm{products[-1]}, %ymm{register}, %ymm{target}"
                for register, target in zip(_WEIGHTS, new, strict=True)
            ]
            lines += waiting
            waiting = []
            for panel, factor in enumerate(held):
                target = sums[panel] if first and not starts else products[panel]
                waiting.append(f"vpmaddwd %ymm{factor}, %ymm{products[panel]}, %ymm{target}")
            if starts or not first:
                # All sums of a token begin with what is in the first panel's, so that is overwritten last.
                for panel in reversed(range(PANELS)):
                    before = sums[0] if first else sums[panel]
                    waiting.append(f"{add} %ymm{products[panel]}, %ymm{before}, %ymm{sums[panel]}")
    lines += waiting
    constraints = [f"=&{{ymm{number}}}" for number in range(_SUMS)] + ["r"] * (PANELS + TOKENS)
    constraints += [str(token) for token in range(len(starts))] + [f"{{ymm{register}}}" for register in held]
    constraints += [f"~{{ymm{number}}}" for number in (*_WEIGHTS, *others)] + ["~{memory}"]
    kinds = [I64] * (PANELS + TOKENS) + [kind] * len(starts) + [V16] * len(factors)
    result = ir.LiteralStructType([kind] * _SUMS)
    values = [*places[0], *places[1], *starts, *factors]
    made = e.builder.asm(ir.FunctionType(result, kinds), "\n".join(lines), ",".join(constraints), values, True)
    found = [e.builder.extract_value(made, number) for number in range(_SUMS)]
    return [found[TOKENS * panel :][:TOKENS] for panel in range(PANELS)]
