"""Write a GGUF file with its matrices packed in another tensor type.

    python -m scripts.requantize tales-f16.gguf tales-IQ3_S.gguf --type IQ3_S
    python -m scripts.requantize in.gguf out.gguf --type Q4_K --override 'attn_v|ffn_down=Q6_K'
    python -m scripts.requantize --list

Norms, biases and the weights that choose experts stay as they are, and so do matrices whose rows are no whole blocks
of the type (they are counted). All weights count alike; quantizers that know from an importance matrix which
weights matter do better at two bits and below.
"""

import argparse
import re
import sys
import time
from pathlib import Path

from engine.errors import EngineError
from engine.gguf import GGMLType, GGUFFile, open_gguf
from engine.gguf.quantizers.quantize import WRITABLE
from engine.gguf.quantizers.rewrite import matrices, rewrite


def choose(
    source: GGUFFile, default: GGMLType | None, overrides: list[tuple[str, GGMLType]]
) -> tuple[dict[str, GGMLType], list[str]]:
    """New types by tensor name, and the matrices that have to stay as they are."""
    types, left = {}, []
    for info in matrices(source):
        matches = (kind for pattern, kind in overrides if re.search(pattern, info.name))
        kind = next(matches, default)
        if kind is None:
            continue
        if info.shape[-1] % kind.block_size:
            left.append(info.name)
        else:
            types[info.name] = kind
    return types, left


def _kind(name: str) -> GGMLType:
    kinds = {kind.name: kind for kind in WRITABLE}
    if name.upper() not in kinds:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be written; allowed: {', '.join(kinds)}")
    return kinds[name.upper()]


def _override(text: str) -> tuple[str, GGMLType]:
    pattern, found, name = text.rpartition("=")
    if not found or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r}: write it as PATTERN=TYPE, for example attn_v=Q6_K")
    return pattern, _kind(name)


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("target", type=Path, nargs="?")
    parser.add_argument("--type", type=_kind, help="type of all matrices; without it only overrides are applied")
    parser.add_argument("--override", type=_override, action="append", default=[], metavar="PATTERN=TYPE")
    parser.add_argument("--list", action="store_true", help="list the types that can be written")
    options = parser.parse_args()
    if options.list:
        for kind in WRITABLE:
            print(f"{kind.name:8} {8 * kind.type_size / kind.block_size:7.4f} bits per weight")
        return 0
    if (
        options.source is None
        or options.target is None
        or (
            options.type is None and not options.override  # F32 is number 0
        )
    ):
        parser.error("give a source, a target and --type or --override")
    started = time.perf_counter()
    try:
        with open_gguf(options.source) as source:
            types, left = choose(source, options.type, options.override)
            rewrite(source, options.target, types)
            before = source.file_size
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = options.target.stat().st_size
    print(
        f"{options.target}: {len(types)} tensors packed, {before / 1e6:.1f} to {size / 1e6:.1f} MB, "
        f"{time.perf_counter() - started:.1f} s"
    )
    if left:
        print(f"left as they are, for their rows are no whole blocks: {', '.join(left[:5])}{' ...' * (len(left) > 5)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
