"""gguf-engine inspect: what is in a file, and what running it takes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.options import shared
from engine.cli.options.groups import Only, with_groups
from engine.cli.options.opening import Opening
from engine.cli.terminal import local_file, warnings_shown, write, write_json
from engine.units import size_text

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.gguf import GGUFFile

LONG_TEXT, LONG_ARRAY, SHOWN_ITEMS = 100, 16, 4


@with_groups
def inspect(
    file: Annotated[Path | None, typer.Argument(help="The GGUF file.", show_default=False)] = None,
    model: shared.ModelOption = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    launches: Annotated[
        bool, typer.Option("--launches", help="List which GPU kernels multiply which tensors (with --device cuda).")
    ] = False,
    json: shared.JsonOption = False,
    sequences: Annotated[
        int | None,
        typer.Option(
            "--sequences",
            "--max-sequences",
            help="Sequences side by side, for the memory plan.",
            show_default="1 on the CPU, what the card has room for on a GPU",
        ),
    ] = None,
    *,
    opening: Annotated[
        Opening,
        Only(
            "device",
            "context_length",
            "kv_type",
            "cache_tokens",
            "prefill_chunk",
            "activation_bits",
            "exact",
            "strict",
        ),
    ],
) -> None:
    """Show a file's metadata, its tensors by type, and the memory that running it takes."""
    from engine.api.llm import BUNDLED_MODEL
    from engine.gguf import open_gguf

    path = local_file(file or model or BUNDLED_MODEL)
    config = opening.config(path, max_sequences=sequences)
    with warnings_shown(), open_gguf(path) as gguf:
        report: dict[str, Any] = {
            "file": str(gguf.path),
            "parts": len(gguf.parts),
            "file_size": gguf.file_size,
            "version": gguf.version,
            "alignment": gguf.alignment,
            "metadata": {key: _plain(value) for key, value in gguf.metadata.items()},
            "tensors": len(gguf.tensors),
            "parameters": sum(info.n_elements for info in gguf.tensors.values()),
            "types": _types(gguf),
            "memory": _memory(gguf, config),
        }
        if launches:
            report["launches"], table = _launches(gguf, config)
        if tensors:
            report["tensor_list"] = [
                {"name": name, "type": info.type.name, "shape": list(info.shape), "bytes": info.n_bytes}
                for name, info in gguf.tensors.items()
            ]
    if json:
        write_json(report)
        return
    _show(report)
    if launches:
        write(f"\n{table or 'launches: the model runs on the CPU'}\n")


def _types(gguf: GGUFFile) -> list[dict[str, Any]]:
    """Tensors, parameters and bytes of each type, the largest first."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for info in gguf.tensors.values():
        for index, value in enumerate((1, info.n_elements, info.n_bytes)):
            sums[info.type.name][index] += value
    ordered = sorted(sums.items(), key=lambda entry: -entry[1][2])
    return [{"type": name, "tensors": n, "parameters": p, "bytes": b} for name, (n, p, b) in ordered]


def _memory(gguf: GGUFFile, config: EngineConfig) -> dict[str, Any]:
    """The memory plan, or why there is none."""
    from engine.errors import EngineError
    from engine.model.loader import load_model
    from engine.runner.devices import choose_device, plan_memory

    try:
        model = load_model(gguf, config.resolve_context, strict=config.strict)
        on_gpu = config.device.startswith("cuda") or choose_device(config.device, config.device_index, model) == "cuda"
        if config.max_sequences is None and not on_gpu:
            config = replace(config, max_sequences=1)
        device, plan = plan_memory(model, config)
    except EngineError as error:
        return {"error": str(error)}
    return {
        "device": device,
        "context_length": config.resolve_context(model.config.context_length),
        "max_sequences": plan.max_sequences,
        "kv_type": config.kv_type,
        "weights_bytes": plan.weights_bytes,
        "repacked_bytes": plan.repacked_bytes,
        "activation_bits": config.activations if device == "cpu" else None,
        "kv_bytes": plan.kv_bytes,
        "cache_tokens": plan.kv_bytes // plan.kv_bytes_per_token if plan.kv_bytes_per_token else None,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "state_bytes": plan.state_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "total_bytes": plan.total_bytes,
    }


def _launches(gguf: GGUFFile, config: EngineConfig) -> tuple[list[dict[str, str]], str]:
    """Rows and a table of what the GPU launches, or why there is none."""
    from engine.errors import EngineError
    from engine.model.loader import load_model
    from engine.runner.devices import plan_launches

    try:
        return plan_launches(load_model(gguf, config.resolve_context), config)
    except EngineError as error:
        return [], f"launches: none, {error}"


def _plain(value: Any) -> Any:
    """A metadata value for JSON; of a long array its beginning and its length, as 128 000 tokens are too many."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list) and len(value) > LONG_ARRAY:
        return {"length": len(value), "first": [_plain(item) for item in value[:SHOWN_ITEMS]]}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _show(report: dict[str, Any]) -> None:
    parts = f" in {report['parts']} parts" if report["parts"] > 1 else ""
    size = size_text(report["file_size"])
    lines = [f"{report['file']}: GGUF version {report['version']}, {size}{parts}", "", "metadata"]
    width = max((len(key) for key in report["metadata"]), default=0)
    lines += [f"  {key:{width}}  {_short(value)}" for key, value in report["metadata"].items()]
    lines += ["", f"tensors: {report['tensors']}, {report['parameters'] / 1e6:,.1f} M parameters"]
    for row in report["types"]:
        bits = 8 * row["bytes"] / max(row["parameters"], 1)
        lines.append(
            f"  {row['type']:8} {row['tensors']:5} tensors {row['parameters'] / 1e6:12,.1f} M "
            f"{size_text(row['bytes']):>10} {bits:6.2f} bits each"
        )
    for row in report.get("tensor_list", ()):
        shape = " x ".join(map(str, row["shape"]))
        lines.append(f"  {row['name']:40} {row['type']:8} {shape:>20} {size_text(row['bytes']):>10}")
    memory = report["memory"]
    if "error" in memory:
        lines += ["", f"memory plan: none, {memory['error']}"]
    else:
        sequences, per_token = memory["max_sequences"], f"{memory['kv_bytes_per_token']:,}"
        lines += [
            "",
            f"memory on {memory['device']}, context {memory['context_length']}, "
            f"{sequences} sequence{'s' if sequences > 1 else ''}",
            f"  weights {size_text(memory['weights_bytes']):>10}",
            *(
                [f"  copies  {size_text(memory['repacked_bytes']):>10}  repacked weights"]
                if memory["repacked_bytes"]
                else []
            ),
            f"  cache   {size_text(memory['kv_bytes']):>10}  {_tokens(memory)}{per_token} bytes per token, "
            f"{memory['kv_type']}",
            *([f"  states  {size_text(memory['state_bytes']):>10}  recurrent layers"] if memory["state_bytes"] else []),
            f"  scratch {size_text(memory['scratch_bytes']):>10}  at most",
            f"  total   {size_text(memory['total_bytes']):>10}",
            *([f"activations: {memory['activation_bits']} bits"] if memory["activation_bits"] else []),
        ]
    write("\n".join(lines) + "\n")


def _tokens(memory: dict[str, Any]) -> str:
    """Tokens of the cache, for people."""
    return f"{memory['cache_tokens']:,} tokens, " if memory["cache_tokens"] else ""


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['length']} items: {', '.join(map(repr, value['first']))}, ..."
    text = value if isinstance(value, str) else str(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= LONG_TEXT else f"{text[:LONG_TEXT]}... ({len(text)} characters)"
