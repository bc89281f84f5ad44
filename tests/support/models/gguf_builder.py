"""GGUF files built in memory for tests: any metadata, any tensors, and a complete small model with its tokenizer.

build_gguf writes what it is told, also nonsense, so that tests can check what the reader refuses.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.gguf.types import GGMLType, row_bytes

SCALARS = {
    "u8": (0, "<B"), "i8": (1, "<b"), "u16": (2, "<H"), "i16": (3, "<h"), "u32": (4, "<I"), "i32": (5, "<i"),
    "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q"), "i64": (11, "<q"), "f64": (12, "<d"),
}  # fmt: skip
DTYPES = {
    "uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6, "bool": 7,
    "uint64": 10, "int64": 11, "float64": 12,
}  # fmt: skip
PLAIN = {
    "float32": GGMLType.F32, "float16": GGMLType.F16, "float64": GGMLType.F64,
    "int8": GGMLType.I8, "int16": GGMLType.I16, "int32": GGMLType.I32, "int64": GGMLType.I64,
}  # fmt: skip


@dataclass(frozen=True)
class Typed:
    """A metadata scalar of a chosen type, e.g. Typed("u16", 3). Plain ints become u32 (i32 below 0, u64 above)."""

    kind: str
    value: int | float | bool


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def encode_value(value: Any) -> tuple[int, bytes]:
    """Return (value type id, bytes) of a metadata value: scalar, str, bytes (raw string), list (nested too), array."""
    if isinstance(value, Typed):
        type_id, fmt = SCALARS[value.kind]
        return type_id, struct.pack(fmt, value.value)
    if isinstance(value, bool | np.bool_):
        return 7, struct.pack("<?", value)
    if isinstance(value, np.generic):
        return DTYPES[value.dtype.name], value.tobytes()
    if isinstance(value, int):
        return encode_value(Typed("i32" if value < 0 else "u32" if value < 2**32 else "u64", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str | bytes):
        return 8, string(value)
    if isinstance(value, np.ndarray):
        return 9, struct.pack("<IQ", DTYPES[value.dtype.name], value.size) + value.tobytes()
    if isinstance(value, list | tuple):
        if value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return encode_value(np.array(value, np.int32 if max(map(abs, value)) < 2**31 else np.int64))
        if value and all(isinstance(v, float) for v in value):
            return encode_value(np.array(value, np.float32))
        parts = [encode_value(v) for v in value]
        kinds = {type_id for type_id, _ in parts} or {8}
        if len(kinds) > 1:
            raise TypeError(f"mixed types in a metadata array: {value!r}")
        return 9, struct.pack("<IQ", kinds.pop(), len(parts)) + b"".join(data for _, data in parts)
    raise TypeError(f"no metadata type for {value!r}")


Tensor = np.ndarray | tuple[np.ndarray, tuple[int, ...], GGMLType]


def build_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """Return a GGUF file.

    Args:
        metadata: values as encode_value takes them; general.alignment is added when alignment is not 32.
        tensors: arrays of a plain dtype (float32, float16, float64, int8 …), or (packed uint8 bytes, shape in numpy
            order, type) for quantized ones.
        version: written as given.
        alignment: of the tensor data.
    """
    metadata = dict(metadata)
    if alignment != 32:
        metadata.setdefault("general.alignment", alignment)
    pairs = b""
    for key, value in metadata.items():
        type_id, data = encode_value(value)
        pairs += string(key) + struct.pack("<I", type_id) + data
    directory, data = b"", bytearray()
    for name, tensor in tensors.items():
        raw, shape, ggml_type = (
            tensor if isinstance(tensor, tuple) else (tensor, tensor.shape, PLAIN[tensor.dtype.name])
        )
        data += bytes(-len(data) % alignment)
        directory += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        directory += struct.pack("<IQ", ggml_type, len(data))
        data += np.ascontiguousarray(raw).tobytes()
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + pairs + directory
    return head + bytes(-len(head) % alignment) + bytes(data) + bytes(-len(data) % alignment)


def pack(array: np.ndarray, ggml_type: GGMLType) -> Tensor:
    """Return a float array as a tensor of the given type for build_gguf.

    Plain types are converted; Q4_0 … Q8_0 are quantized by the gguf package; types that it cannot write get random
    blocks with the standard deviation of the array.
    """
    array = np.ascontiguousarray(array, np.float32)
    if ggml_type is GGMLType.F32:
        return array
    if ggml_type is GGMLType.F16:
        return array.astype(np.float16)
    if ggml_type is GGMLType.F64:
        return array.astype(np.float64)
    import gguf

    if ggml_type.name in ("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        raw = gguf.quants.quantize(array, gguf.GGMLQuantizationType(int(ggml_type)))
    else:
        raw = random_blocks(array.shape, ggml_type, std=float(array.std()), seed=array.size)
    return raw, array.shape, ggml_type


def random_blocks(shape: tuple[int, ...], ggml_type: GGMLType, *, std: float = 0.05, seed: int = 0) -> np.ndarray:
    """Return random packed blocks, uint8 (*shape[:-1], row bytes), of about the given standard deviation.

    For every format; all bits of the block in use. The mean is near zero (Q4_0 and Q5_0, whose numbers reach one step
    further down than up: within a fifth of std). Whole numbers (I8 ... I64) are rounded, so std should be large there.
    """
    from engine.gguf.quants import FORMATS

    fmt = FORMATS[ggml_type]
    rng = np.random.default_rng(seed)
    n_bytes = row_bytes(ggml_type, shape[-1])
    if ggml_type.block_size == 1:
        x = rng.normal(0, std, shape).astype(np.float32)
        if ggml_type is GGMLType.BF16:
            return np.ascontiguousarray(x.view(np.uint16)[..., 1::2]).view(np.uint8)
        plain = fmt.layout["x"]
        if plain.kind == "i":
            x = np.rint(x)
        return x.astype(plain).view(np.uint8).reshape(*shape[:-1], n_bytes)
    raw = rng.integers(0, 256, (*shape[:-1], n_bytes), dtype=np.uint8)
    if not raw.size:
        return raw
    blocks = raw.reshape(-1).view(fmt.layout)
    if ggml_type is GGMLType.Q6_K:
        blocks["scales"] = rng.integers(8, 128, blocks["scales"].shape) * rng.choice([-1, 1], blocks["scales"].shape)
    if ggml_type is GGMLType.IQ1_M:
        # The float16 scale is scattered over the upper four bits of four words.
        _set_iq1_m_scale(blocks, np.float16(1))
        _set_iq1_m_scale(blocks, np.float16(std / fmt.dequantize(raw).std()))
        return raw
    if ggml_type in (GGMLType.MXFP4, GGMLType.NVFP4):
        # Scales are whole powers of two (MXFP4) or of three bits: two neighbours, mixed for the right variance.
        name, end = ("e", 240) if ggml_type is GGMLType.MXFP4 else ("d", 127)
        codes, spreads = np.arange(1, end, dtype=np.uint8), []
        for code in codes:
            blocks[name] = code
            spreads.append(fmt.dequantize(raw.reshape(-1, fmt.type_size)[:64]).std(dtype=np.float64))
        low = int(np.searchsorted(spreads, std)) - 1
        a, b = spreads[low] ** 2, spreads[low + 1] ** 2
        blocks[name] = codes[low] + (rng.random(blocks[name].shape) < (std**2 - a) / (b - a))
        return raw
    # x = d a - m b: learn the spread and the mean of a and b from a unit scale, then set d and m for mean 0.
    minimum = {"m": 1.0, "dmin": -1.0}
    names = [name for name in ("d", "m", "dmin") if name in (fmt.layout.names or ())]
    for name in names:
        blocks[name] = 1 if name == "d" else 0
    a = fmt.dequantize(raw).astype(np.float64)
    if len(names) == 1:
        blocks["d"] = std / a.std()
        if abs(a.mean()) > 0.2 * a.std():  # levels that are not centred: half of the blocks turned around
            blocks["d"] = std / np.sqrt((a * a).mean()) * rng.choice([-1, 1], len(blocks))
    else:
        low = names[1]
        blocks["d"], blocks[low] = 0, 1
        b = fmt.dequantize(raw).astype(np.float64) * minimum[low]
        ratio = a.mean() / b.mean()
        blocks["d"] = std / (a - ratio * b).std()
        blocks[low] = -minimum[low] * ratio * std / (a - ratio * b).std()
    return raw


def _set_iq1_m_scale(blocks: np.ndarray, d: np.float16) -> None:
    parts = int(d.view(np.uint16)) >> np.arange(0, 16, 4) & 15
    blocks["scales"] = blocks["scales"] & 0x0FFF | (parts << 12).astype(np.uint16)


def byte_tokens() -> list[str]:
    """Return the 256 single-byte tokens of GPT-2's byte-level BPE, in byte order, as printable characters."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


MERGES = ["Ġ t", "h e", "Ġt he", "i n", "e r", "Ġ a", "o n", "Ġ w", "r e", "n d", "Ġa nd", "Ġ s", "l l", "in g"]


def bpe_tokenizer(vocab: int | None = None) -> dict[str, Any]:
    """Return the metadata of a small byte-level BPE tokenizer.

    Ids: 0-255 the bytes, then one per merge of MERGES, then unused tokens up to vocab - 2, then the control tokens
    <|begin_of_text|> (BOS) and <|end_of_text|> (EOS) last. The smallest vocab, the default, is 272.
    """
    tokens = byte_tokens() + [merge.replace(" ", "") for merge in MERGES]
    size = len(tokens) + 2 if vocab is None else vocab
    if size < len(tokens) + 2:
        raise ValueError(f"vocab {size}: at least {len(tokens) + 2}")
    types = [1] * len(tokens)
    n_unused = size - 2 - len(tokens)
    tokens += [f"<unused{i}>" for i in range(n_unused)] + ["<|begin_of_text|>", "<|end_of_text|>"]
    types += [5] * n_unused + [3, 3]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": size - 2,
        "tokenizer.ggml.eos_token_id": size - 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def tiny_llama_parts(
    *,
    seed: int = 0,
    n_layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 96,
    vocab: int | None = None,
    context_length: int = 128,
    tied: bool = True,
    tokenizer: bool = True,
    weight_type: GGMLType = GGMLType.F32,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (metadata, tensors) of tiny_llama, to be changed before build_gguf."""
    rng = np.random.default_rng(seed)
    vocab = vocab or 256 + len(MERGES) + 2
    head = width // heads
    a = architecture
    meta: dict[str, Any] = {
        "general.architecture": a,
        "general.name": "tiny",
        "general.file_type": 0,
        "general.quantization_version": 2,
        f"{a}.block_count": n_layers,
        f"{a}.context_length": context_length,
        f"{a}.embedding_length": width,
        f"{a}.feed_forward_length": ffn,
        f"{a}.attention.head_count": heads,
        f"{a}.attention.head_count_kv": kv_heads,
        f"{a}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{a}.rope.dimension_count": head,
        f"{a}.rope.freq_base": 10000.0,
        f"{a}.vocab_size": vocab,
    }
    if tokenizer:
        meta |= bpe_tokenizer(vocab)
    meta |= metadata or {}

    def matrix(rows: int, cols: int, gain: float = 1.0) -> Tensor:
        """Weights that keep the scale of a normalized input; F32 where the row is no whole number of blocks."""
        array = rng.normal(0, gain / np.sqrt(cols), (rows, cols)).astype(np.float32)
        fits = cols % weight_type.block_size == 0
        return pack(array, weight_type if fits else GGMLType.F32)

    def norm() -> np.ndarray:
        return rng.uniform(0.5, 1.5, width).astype(np.float32)

    # Against a normalized input the rows of the (tied) head give logits of standard deviation about 3.
    tensors: dict[str, Tensor] = {"token_embd.weight": matrix(vocab, width, 3.0)}
    for i in range(n_layers):
        tensors |= {
            f"blk.{i}.attn_norm.weight": norm(),
            f"blk.{i}.attn_q.weight": matrix(heads * head, width, 1.5),
            f"blk.{i}.attn_k.weight": matrix(kv_heads * head, width, 1.5),
            f"blk.{i}.attn_v.weight": matrix(kv_heads * head, width),
            f"blk.{i}.attn_output.weight": matrix(width, heads * head),
            f"blk.{i}.ffn_norm.weight": norm(),
            f"blk.{i}.ffn_gate.weight": matrix(ffn, width),
            f"blk.{i}.ffn_up.weight": matrix(ffn, width),
            f"blk.{i}.ffn_down.weight": matrix(width, ffn),
        }
    tensors["output_norm.weight"] = norm()
    if not tied:
        tensors["output.weight"] = matrix(vocab, width, 3.0)
    return meta, tensors


def tiny_llama(path: str | Path | None = None, **options: Any) -> bytes:
    """Return a complete, random but well-scaled llama-architecture file, and write it to path if one is given.

    Options are those of tiny_llama_parts: seed, n_layers=2, width=64, heads=4, kv_heads=2, ffn=96, vocab=272,
    context_length=128, tied=True, tokenizer=True, weight_type=F32, architecture="llama", metadata (added last).
    For a quantized weight_type choose width and ffn as multiples of its block size (32, or 256 for K formats): rows
    that are not stay F32.
    """
    data = build_gguf(*tiny_llama_parts(**options))
    if path is not None:
        Path(path).write_bytes(data)
    return data
