"""Write GGUF files of real models' shapes and tensor types with random weights, for benchmarks and tests.

    python -m scripts.make_synthetic_gguf llama-3.1-8b --type Q4_K_M -o 8b.gguf
    python -m scripts.make_synthetic_gguf qwen3-30b-a3b --type Q4_K_M --override 'ffn_down_exps=Q8_0'
    python -m scripts.make_synthetic_gguf --list

Speed depends on shapes and types, not on what the weights say, so a file of the right size and layout measures as the
real one would. The weights are drawn as packed blocks, scaled so that activations keep their size and logits spread;
tensor types follow llama.cpp's recipes, file sizes come out as those of its quantizer. The tokenizer is a byte-level
BPE of the right size with made-up words. Equal arguments give equal files.
"""

import argparse
import itertools
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.gguf import FORMATS, GGMLType
from engine.gguf.quantizers.quantize import quantize
from scripts.synthetic_models import RECIPES, plan
from scripts.synthetic_shapes import SHAPES, Shape
from scripts.synthetic_tensors import Tensor

ALIGNMENT = 32
POOL_BYTES = 16 << 20
QUANTIZED_BLOCKS = 1 << 10


# -- metadata ----------------------------------------------------------------------------------------------------------

SPECIALS = {
    "llama": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
    ],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
TEMPLATES = {
    "llama": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "qwen": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


def vocabulary(size: int, n_special: int) -> tuple[list[str], list[str]]:
    """Return (tokens, merges): the 256 bytes, then made-up words, each a shorter word and one letter more."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(256)
    tokens = [chr(b) if b in printable else chr(next(spare)) for b in range(256)]
    merges: list[str] = []
    words = ["Ġ", *"etaoinshrdlucmfwypvbgkjqxz"]
    letters = words[1:]
    for word in words:  # grows while it is walked: breadth first
        for letter in letters:
            if len(tokens) >= size - n_special:
                return tokens, merges
            tokens.append(word + letter)
            merges.append(f"{word} {letter}")
            words.append(word + letter)
    raise AssertionError("words never run out")


def metadata(s: Shape, name: str, recipe: str) -> dict[str, tuple[str, Any]]:
    """Return key -> (kind, value) as encode takes it."""
    family = "llama" if s.architecture == "llama" else "qwen"
    n_special = {128256: 256, 151936: 293}.get(s.vocab, 16)
    tokens, merges = vocabulary(s.vocab, n_special)
    first = len(tokens)
    named = SPECIALS[family]
    tokens += [*named, *(f"<|reserved_special_token_{i}|>" for i in range(n_special - len(named)))]
    a = s.architecture
    meta: dict[str, tuple[str, Any]] = {
        "general.architecture": ("str", a),
        "general.type": ("str", "model"),
        "general.name": ("str", f"{name} (synthetic)"),
        "general.file_type": ("u32", RECIPES[recipe][1]),
        "general.quantization_version": ("u32", 2),
        f"{a}.block_count": ("u32", s.layers),
        f"{a}.context_length": ("u32", s.context_length),
        f"{a}.embedding_length": ("u32", s.width),
        f"{a}.feed_forward_length": ("u32", s.ffn),
        f"{a}.attention.head_count": ("u32", s.heads),
        f"{a}.attention.layer_norm_rms_epsilon": ("f32", s.epsilon),
        f"{a}.vocab_size": ("u32", s.vocab),
    }
    if s.heads:
        meta |= {
            f"{a}.attention.head_count_kv": ("u32", s.kv_heads),
            f"{a}.attention.key_length": ("u32", s.head_dim),
            f"{a}.attention.value_length": ("u32", s.head_dim),
            f"{a}.rope.freq_base": ("f32", s.rope_base),
            f"{a}.rope.dimension_count": ("u32", s.rope_dim or s.head_dim),
        }
    if s.ranks:
        names = ("decay", "iclr", "value_residual_mix", "gate")
        meta |= {f"{a}.attention.{name}_lora_rank": ("u32", rank) for name, rank in zip(names, s.ranks, strict=True)}
        meta |= {
            f"{a}.attention.layer_norm_epsilon": ("f32", s.epsilon),
            f"{a}.wkv.head_size": ("u32", s.head_dim),
            f"{a}.token_shift_count": ("u32", 2),
        }
    if s.full_every:
        pairs = s.rope_dim // 2
        thirds = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3, 0]
        meta |= {
            f"{a}.rope.dimension_sections": ("i32s", thirds),
            f"{a}.full_attention_interval": ("u32", s.full_every),
            f"{a}.ssm.group_count": ("u32", s.key_heads),
        }
    if s.inner:
        meta |= {
            f"{a}.ssm.inner_size": ("u32", s.inner),
            f"{a}.ssm.state_size": ("u32", s.state),
            f"{a}.ssm.conv_kernel": ("u32", s.conv),
            f"{a}.ssm.time_step_rank": ("u32", s.dt_rank),
        }
    if s.groups:
        meta[f"{a}.ssm.group_count"] = ("u32", s.groups)
    if s.attention_layers:
        meta[f"{a}.attention.head_count_kv"] = ("i32s", [s.kv_heads * s.attends(layer) for layer in range(s.layers)])
        if not s.groups:
            meta[f"{a}.shortconv.l_cache"] = ("u32", s.conv)
    names = ("embedding_scale", "residual_scale", "attention.scale", "logit_scale")
    meta |= {f"{a}.{name}": ("f32", value) for name, value in zip(names, s.multipliers, strict=False)}
    if s.experts:
        meta |= {
            f"{a}.expert_count": ("u32", s.experts),
            f"{a}.expert_used_count": ("u32", s.experts_used),
            f"{a}.expert_feed_forward_length": ("u32", s.expert_ffn),
        }
    if s.shared_ffn:
        meta[f"{a}.expert_shared_feed_forward_length"] = ("u32", s.shared_ffn)
    end = first + named.index("<|eot_id|>" if family == "llama" else "<|im_end|>")
    return meta | {
        "tokenizer.ggml.model": ("str", "gpt2"),
        "tokenizer.ggml.pre": ("str", "llama-bpe" if family == "llama" else "qwen2"),
        "tokenizer.ggml.tokens": ("strings", tokens),
        "tokenizer.ggml.token_type": ("i32s", np.repeat([1, 3], [first, n_special]).astype("<i4")),
        "tokenizer.ggml.merges": ("strings", merges),
        "tokenizer.ggml.bos_token_id": ("u32", first),
        "tokenizer.ggml.eos_token_id": ("u32", end),
        "tokenizer.ggml.add_bos_token": ("bool", family == "llama"),
        "tokenizer.chat_template": ("str", TEMPLATES[family]),
    }


# -- the file ----------------------------------------------------------------------------------------------------------


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def encode(kind: str, value: Any) -> bytes:
    """Return a metadata value with its type id."""
    match kind:
        case "str":
            return struct.pack("<I", 8) + _string(value)
        case "strings":
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        case "i32s":
            return struct.pack("<IIQ", 9, 5, len(value)) + np.asarray(value, np.int32).tobytes()
    type_id, code = {"u32": (4, "I"), "f32": (6, "f"), "bool": (7, "?")}[kind]
    return struct.pack(f"<I{code}", type_id, value)


def header(meta: dict[str, tuple[str, Any]], tensors: list[Tensor]) -> bytes:
    """Return everything before the tensor data, padded."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(meta))]
    parts += [_string(key) + encode(*value) for key, value in meta.items()]
    offset = 0
    for t in tensors:
        dims = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *reversed(t.shape))
        parts.append(_string(t.name) + dims + struct.pack("<IQ", t.type, offset))
        offset += -(-t.n_bytes // ALIGNMENT) * ALIGNMENT
    head = b"".join(parts)
    return head + bytes(-len(head) % ALIGNMENT)


class Pool:
    """Some megabytes of random blocks of one type, written again and again with new scales and from new places.

    Drawing every byte would be slower than the disk; repeating whole rows would give tokens equal logits. So each
    piece that is written starts at a random block and gets new random scales (sign included) for all its blocks.
    Where scales are no float16 fields (IQ1_M, NVFP4, MXFP4) blocks are normal numbers, quantized.
    """

    def __init__(self, ggml_type: GGMLType, seed: int) -> None:
        """Draw the blocks and learn what scales give them mean 0 and standard deviation 1."""
        fmt = FORMATS[ggml_type]
        rng = np.random.default_rng([seed, ggml_type])
        n = POOL_BYTES // ggml_type.type_size
        self.scales: dict[str, float] = {}  # field -> value for standard deviation 1
        self.plain, self.quantized = ggml_type.block_size == 1, False
        if self.plain:
            x = rng.standard_normal(n, np.float32)
            if ggml_type is GGMLType.BF16:
                self.blocks = (x.view(np.uint32) >> 16).astype(np.uint16).view(fmt.layout)
            else:
                self.blocks = x.astype(fmt.layout["x"]).view(fmt.layout)
            return
        self.blocks = np.frombuffer(bytearray(rng.bytes(n * ggml_type.type_size)), fmt.layout)
        fields = fmt.layout.names or ()
        names = [name for name in ("d", "m", "dmin") if name in fields and fmt.layout[name].kind == "f"]
        self.quantized = not names
        if self.quantized:
            self.normal = rng.standard_normal((QUANTIZED_BLOCKS, fmt.block_size), np.float32)
            return
        sample = self.blocks[:4096].copy()
        unit = []
        for one in names:  # x is linear in the scales: decode with each of them 1 and the others 0
            for name in names:
                sample[name] = float(name == one)
            unit.append(fmt.dequantize(sample.view(np.uint8)).astype(np.float64))
        # With a minimum, its share is what brings the mean to 0.
        shares = [1.0] if len(unit) == 1 else [1.0, -unit[0].mean() / unit[1].mean()]
        std = np.sum([share * x for share, x in zip(shares, unit, strict=True)], axis=0).std()
        self.scales = {name: share / std for name, share in zip(names, shares, strict=True)}

    def write(self, out: BinaryIO, t: Tensor, rng: np.random.Generator) -> None:
        """Write a tensor's blocks."""
        left = t.n_bytes // t.type.type_size
        if self.quantized:
            self.blocks = quantize(self.normal * np.float32(t.std), t.type).reshape(-1).view(self.blocks.dtype)
        while left:
            start = int(rng.integers(0, max(len(self.blocks) // 2, 1)))
            n = min(left, len(self.blocks) - start)
            piece = self.blocks[start : start + n]
            if self.plain:
                field = piece["x"].view(np.uint16) if t.type is GGMLType.BF16 else piece["x"]
                if t.type is GGMLType.BF16:
                    x = (field.astype(np.uint32) << 16).view(np.float32) * np.float32(t.std) + np.float32(t.mean)
                    field = (x.view(np.uint32) >> 16).astype("<u2")
                else:
                    field = (field * field.dtype.type(t.std) + field.dtype.type(t.mean)).astype(field.dtype)
                out.write(field.data)
            else:
                factors = rng.uniform(0.7, 1.3, n).astype(np.float32)
                factors[rng.integers(0, 2, n, dtype=np.bool_)] *= -1
                for name, value in self.scales.items():
                    piece[name] = factors * np.float32(value * t.std)
                out.write(piece.view(np.uint8).data)
            left -= n


def write_model(
    path: Path, name: str, s: Shape, recipe: str, tensors: list[Tensor], seed: int = 0, *, quiet: bool = True
) -> int:
    """Write the file and return its size; memory stays at a few pools whatever the size."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    total = sum(t.n_bytes for t in tensors)
    pools: dict[GGMLType, Pool] = {}
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with path.open("wb") as out, Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task(path.name, total=total)
        out.write(header(metadata(s, name, recipe), tensors))
        for i, t in enumerate(tensors):
            if t.values is not None:
                out.write(t.values.astype("<f4").tobytes())
            else:
                if t.type not in pools:
                    pools[t.type] = Pool(t.type, seed)
                pools[t.type].write(out, t, np.random.default_rng([seed, 1000, i]))
            out.write(bytes(-t.n_bytes % ALIGNMENT))
            progress.advance(task, t.n_bytes)
        return out.tell()


def parse_override(text: str) -> tuple[str, GGMLType]:
    """Split REGEX=TYPE."""
    pattern, _, type_name = text.rpartition("=")
    known = {t.name: t for t in FORMATS}
    try:
        re.compile(pattern)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{pattern!r} is no regular expression: {error}") from None
    if not pattern or type_name not in known:
        raise argparse.ArgumentTypeError(f"{text!r}; write REGEX=TYPE with one of {', '.join(known)}")
    return pattern, known[type_name]


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a GGUF file of a real model's shape with random weights.")
    parser.add_argument("shape", nargs="?", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--type", default="Q4_K_M", choices=RECIPES, help="tensor types as llama.cpp would choose them")
    parser.add_argument(
        "--override", action="append", type=parse_override, default=[], metavar="REGEX=TYPE",
        help="type of the matrices whose name matches; may be given again, the last match counts",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, help="write fewer (or more) layers than the shape has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="default: SHAPE-TYPE.gguf here")
    parser.add_argument("--dry-run", action="store_true", help="only say how large the file would be")
    parser.add_argument("--list", action="store_true", help="list shapes and their sizes as --type")
    args = parser.parse_args(argv)
    if args.list:
        for name, s in SHAPES.items():
            print(f"{name:16} {sum(t.n_bytes for t in plan(s, args.type)) / 1e9:8.3f} GB as {args.type}")
        return
    if args.shape is None:
        parser.error("which shape? see --list")
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers {args.layers}: at least 1")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: at least 0")
    s = SHAPES[args.shape]
    s = replace(s, layers=args.layers or s.layers)
    tensors = plan(s, args.type, args.override)
    by_type = {t: sum(x.n_bytes for x in tensors if x.type is t) for t in sorted({x.type for x in tensors})}
    print(f"{args.shape}: " + ", ".join(f"{t.name} {n / 1e6:.1f} MB" for t, n in by_type.items()), file=sys.stderr)
    if args.dry_run:
        return
    path = args.output or Path(f"{args.shape}-{args.type}.gguf")
    size = write_model(path, args.shape, s, args.type, tensors, args.seed, quiet=not sys.stderr.isatty())
    print(f"{path}: {size / 1e9:.3f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
