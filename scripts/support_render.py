"""docs/support.md from the results that support_table.py keeps in benchmarks/support.json."""

from collections.abc import Iterator
from typing import Any

from engine.gguf import GGMLType
from engine.model.architectures import ARCHITECTURES
from tests.support.conformance import BY_FORMULA
from tests.support.models.hybrid_models import REUSED

REFUSED = {
    "parts of models of pictures and sound": ("clip", "wavtokenizer-dec", "pockettts", "qwen3tts"),
    "drafters, which another model's states run through": ("eagle3", "dflash", "gemma4-assistant"),
    "diffusion models, which do not predict a text from left to right": ("dream", "llada", "llada-moe", "rnd1"),
    "adapters that tokens of the text switch on and off": ("graniteswitch",),
}
"""Names that llama.cpp knows and this engine refuses, by the reason."""

UNMEASURED, FALLS_BACK = "not measured", "falls back to the CPU"

HEAD = """# What is supported, and how exactly

Made by `scripts/support_table.py` from `benchmarks/support.json`; do not edit. {machines}

Errors are normalized mean squared errors of logits, all tokens in one batch and token by token. The CPU computes them
in float32 with a float32 cache; the GPU with its default float16 cache. Where the GPU does not serve a type or a part
of a model, `device="auto"` takes the CPU and says so.
"""

TYPES = """
## Tensor types

Decoding: random bytes against the `gguf` package, bit for bit, or where it lacks the type against plain loops written
from the format's description (`tests/support/block_references.py`). Errors: the demonstration model with all matrices
in that type, against plain numpy with the same packed weights; for whole numbers, which no quantizer writes, of a
product against float64. Types are written by `scripts/requantize.py`, without an importance matrix.

Perplexity: {text},
with one standard error. All matrices are in the type, also the embedding, which is the output matrix too. On the CPU
in float32 throughout, and as it runs unless it is told otherwise, where that rounds activations to 8 bits, beside BF16
weights to BF16, or beside F16 weights to 14 bits.

{speed}
| type | bits | decoding | CPU at once | by token | GPU at once | by token | perplexity CPU | as it runs | GPU | tok/s |
|---|---|---|---|---|---|---|---|---|---|---|
"""

SPEED = """Tokens per second on the CPU: a prompt of 128 / decoding, in brackets times those of {peers} on the
same file; the shape of Llama-3.2-1B with six layers, all matrices in the type, 2 threads, medians of runs by turns
(`scripts/support_speed.py`; {machine}, {date}).
"""

ARCHITECTURE = """
## Architectures

Errors: small models of random weights, 48 tokens, against llama.cpp in float32 with a float32 cache. On the GPU the
operands of prompts and the cache are float16. Names are those that files carry as `general.architecture`.

A text that continues an earlier one reads only what is new. Pages: of attention, keys and values are shared, tested
with windows, latent, indexed and compressed attention (`tests/api/test_same_bits_tiny.py`). Recurrent layers have a
checkpoint of their state as well, tested with the mixer named (`tests/api/test_same_bits_recurrent.py`).

| architecture | CPU at once | CPU by token | GPU at once | GPU by token | recurrent | prefix reuse |
|---|---|---|---|---|---|---|
"""


def render(results: dict[str, Any]) -> str:
    """The Markdown text."""
    measured = results.get("measured", {})
    machines = " ".join(
        f"{device.upper()}: {entry['machine']}, {entry['date']}."
        for device, entry in sorted(measured.items())
        if device != "speed"
    )
    lines = [
        HEAD.format(machines=machines),
        TYPES.format(text=_text(results), speed=_speed_method(results)),
        *_types(results),
        ARCHITECTURE,
    ]
    lines += _architectures(results)
    return "".join(lines)


def _text(results: dict[str, Any]) -> str:
    counts = {
        cell["chunks"]
        for row in results.get("types", {}).values()
        for cell in row.values()
        if isinstance(cell, dict) and "chunks" in cell
    }
    said = " or ".join(str(count) for count in sorted(counts)) or "no"
    return f"`held_out.txt`, the first {said} chunks of 512 tokens, by llama.cpp's method"


def _speed_method(results: dict[str, Any]) -> str:
    measured = results.get("measured", {}).get("speed")
    if not measured:
        return "Speed: not measured.\n"
    cells = [row["speed"] for row in results["types"].values() if "speed" in row]
    peers = list(dict.fromkeys(name for cell in cells for name in cell["peers"]))
    return SPEED.format(peers=peers[0] if len(peers) == 1 else f"the fastest of {', '.join(peers)}", **measured)


def _types(results: dict[str, Any]) -> Iterator[str]:
    for kind in GGMLType:
        row = results.get("types", {}).get(kind.name, {})
        decoding = row.get("decoding")
        if decoding is None:
            said = UNMEASURED
        else:
            said = ("exact" if decoding["exact"] else "DIFFERENT") + f" ({decoding['against']})"
        bits = f"{8 * kind.type_size / kind.block_size:.4f}".rstrip("0").rstrip(".")
        whole = kind.name in ("I8", "I16", "I32", "I64")
        cells = [kind.name, bits, said, *_errors(row.get("cpu")), *_errors(row.get("gpu"))]
        as_run = row.get("cpu", {}).get("as_run")
        same = "same" if "cpu" in row else UNMEASURED
        perplexities = (_perplexity(row.get("cpu")), f"{as_run:.4f}" if as_run else same, _perplexity(row.get("gpu")))
        cells += ("-", "-", "-") if whole else perplexities
        cells.append(_speed(row.get("speed")))
        yield f"| {' | '.join(cells)} |\n"


def _architectures(results: dict[str, Any]) -> Iterator[str]:
    notes, rows = [], results.get("architectures", {})
    for file, row in sorted(rows.items(), key=lambda entry: label(entry[0])):
        name = label(file)
        cells = [name, *_errors(row.get("cpu")), *_errors(row.get("gpu")), *_recurrent(name.partition(",")[0])]
        yield f"| {' | '.join(cells)} |\n"
        gpu = row.get("gpu", {})
        if gpu.get("falls_back"):
            notes.append(f"- {name}: the GPU lacks {gpu['falls_back']}.\n")
        if "f32_at_once" in gpu:
            notes.append(
                f"- {name}: on the GPU with a float32 cache {gpu['f32_at_once']:.1e} at once, "
                f"{gpu['f32_single']:.1e} by token.\n"
            )
    encoders = sorted(name for name, family in ARCHITECTURES.items() if not family.head.generates)
    measured = {file.rpartition("-")[0] for file in rows}
    families = sorted(set(ARCHITECTURES) - measured - set(encoders) - BY_FORMULA)
    if families:
        yield (
            "\nWithout a conformance file, and held to llama.cpp's logits of smaller models on the CPU, below 1e-8 but "
            f"for qwen2vl, 1e-6 (`tests/model/test_peer_logits.py`): {', '.join(families)}. So are the scalings of "
            "positions: linear, YaRN, long factors, also beside windows and with latent attention. "
            f"{', '.join(sorted(BY_FORMULA))}, which llama.cpp does not run, is held to its formula in float64.\n"
        )
    yield (
        "\nModels that make embeddings or rank and predict no tokens, on the CPU, held to llama.cpp's vectors of small "
        "models (`tests/model/test_peer_embeddings.py`): cosine above 0.99999, relative error below 3e-6, with GELU, "
        "which rounds to float16, below 1e-4, with GELU in experts or before a score below 3e-4; on the GPU, held to "
        "the CPU's vectors of all tokens, normalized squared error below 1e-5 (`tests/cuda/test_embeddings.py`): "
        f"{', '.join(encoders)}. All that predict tokens make embeddings as well, on both devices; with "
        "`attention.causal` false in the file they do nothing else ([embeddings.md](embeddings.md)).\n"
    )
    refused = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in REFUSED.items())
    yield f"\nOf the names that llama.cpp knows these are refused: {refused}. Of T5 the encoder alone is served.\n"
    if notes:
        yield "\n" + "".join(notes)


def _recurrent(name: str) -> tuple[str, str]:
    """The recurrent mixer of a family, and how its prefixes are reused."""
    parts = ARCHITECTURES[name].recurrent
    if parts is None:
        return "-", "pages"
    tested = {"mamba", *REUSED}
    kinds = {family.kind for one in tested if (family := ARCHITECTURES[one].recurrent) is not None}
    return parts.kind.value, "tested" if parts.kind in kinds else "not tested"


def label(file: str) -> str:
    """What a conformance file stands for: the value of its general.architecture, and whether layers have experts."""
    name, _, kind = file.rpartition("-")
    return f"{name}, experts" if kind == "moe" and ARCHITECTURES[name].moe is not None else name


def _errors(cell: dict[str, Any] | None) -> tuple[str, str]:
    if not cell:
        return UNMEASURED, UNMEASURED
    if "falls_back" in cell:
        return FALLS_BACK, FALLS_BACK
    if "failed" in cell:
        return "failed", "failed"
    if "at_once" not in cell:
        return (f"as {cell['kept_as']}",) * 2
    return f"{cell['at_once']:.1e}", f"{cell['single']:.1e}"


def _speed(cell: dict[str, Any] | None) -> str:
    if not cell:
        return "-"
    pairs = [cell["prompt of 128"], cell["decode at depth 0"]]
    mine = " / ".join(f"{own:.0f}" if own >= 100 else f"{own:.1f}" for own, *_ in pairs)
    return f"{mine} ({' / '.join(f'{own / max(peers):.2f}' for own, *peers in pairs)})"


def _perplexity(cell: dict[str, Any] | None) -> str:
    if not cell or ("perplexity" not in cell and "falls_back" not in cell and "failed" not in cell):
        return UNMEASURED
    if "falls_back" in cell:
        return FALLS_BACK
    if "failed" in cell:
        return "failed"
    digits = 4 if cell["perplexity"] < 1e3 else 0
    return f"{cell['perplexity']:.{digits}f} ± {cell['error']:.{min(digits, 2)}f}"
