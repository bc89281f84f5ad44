"""gguf-engine serve: the engine behind the HTTP APIs of OpenAI, Anthropic, Ollama and llama.cpp."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.options import shared
from engine.cli.options.cluster import Cluster
from engine.cli.options.groups import Without, with_groups
from engine.cli.options.opening import Opening
from engine.cli.options.sampling import SAMPLING, Sampling
from engine.cli.options.variables import parse_variables
from engine.cli.terminal import note, read_text, status, warnings_shown, write
from engine.errors import EngineError, InvalidRequestError
from engine.split_names import part_name

if TYPE_CHECKING:
    from engine.serve.models.model_store import ModelSpec
    from engine.serve.settings import ServeSettings

SERVER = "Server"
LIMITS = "Limits"
MODELS = "Models"


@with_groups
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="GGUF file (any part of a split one), or hf:owner/repo[:quant]; may be given several times.",
            show_default="the bundled model",
            rich_help_panel=MODELS,
        ),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            "--alias",
            "-a",
            help="Name of the model for clients, further names after commas; once for each --model, in their order.",
            show_default="the file's name",
            rich_help_panel=MODELS,
        ),
    ] = None,
    models_dir: Annotated[
        Path | None,
        typer.Option(
            "--models-dir", help="Offer every GGUF file of this folder.", show_default=False, rich_help_panel=MODELS
        ),
    ] = None,
    max_models: Annotated[
        int | None,
        typer.Option(
            "--max-models",
            min=1,
            help="Models open at a time; the least recently used one is closed for another.",
            show_default="as many as the memory holds",
            rich_help_panel=MODELS,
        ),
    ] = None,
    idle: Annotated[
        float | None,
        typer.Option(
            "--idle",
            help="Close a model after so many seconds without a request; the next one opens it again.",
            show_default="never",
            rich_help_panel=MODELS,
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on; several with commas.", rich_help_panel=SERVER),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.", rich_help_panel=SERVER)] = 8080,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            help="Ask for this key; may be given several times.",
            rich_help_panel=SERVER,
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", help="Keys, one a line; # begins a remark.", rich_help_panel=SERVER, show_default=False
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            help="Let pages of this origin call the server; * is all; may be given several times.",
            show_default="none",
            rich_help_panel=SERVER,
        ),
    ] = None,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="A page for chatting at /.", rich_help_panel=SERVER)
    ] = True,
    slots: Annotated[
        bool, typer.Option("--slots/--no-slots", help="Whether /slots answers.", rich_help_panel=SERVER)
    ] = True,
    metrics_style: Annotated[
        str,
        typer.Option(
            "--metrics-style", help="Names of the metrics at /metrics: vllm or llamacpp.", rich_help_panel=SERVER
        ),
    ] = "vllm",
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="One JSON line on stderr per request.", rich_help_panel=SERVER)
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Say what the server does, and which fields it ignores.", rich_help_panel=SERVER
        ),
    ] = False,
    max_waiting: Annotated[
        int,
        typer.Option("--max-waiting", help="Requests that may wait; others get status 429.", rich_help_panel=LIMITS),
    ] = 256,
    max_body: Annotated[
        float, typer.Option("--max-body", help="MiB of a request's body.", rich_help_panel=LIMITS)
    ] = 16.0,
    max_connections: Annotated[
        int, typer.Option("--max-connections", help="Open connections.", rich_help_panel=LIMITS)
    ] = 1000,
    read_timeout: Annotated[
        float,
        typer.Option(
            "--read-timeout",
            help="Seconds in which a client must send a request, and take what it is sent.",
            rich_help_panel=LIMITS,
        ),
    ] = 60.0,
    keep_alive: Annotated[
        float, typer.Option("--keep-alive", help="Seconds an idle connection stays open.", rich_help_panel=LIMITS)
    ] = 75.0,
    ping: Annotated[
        float, typer.Option("--ping", help="Seconds between comments in a quiet stream.", rich_help_panel=LIMITS)
    ] = 15.0,
    deadline: Annotated[
        float | None,
        typer.Option(
            "--deadline",
            help="Seconds that a request may take, waiting included.",
            show_default="any time",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option("--grace", help="Seconds that running requests have after SIGTERM.", rich_help_panel=LIMITS),
    ] = 30.0,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens",
            "--n-predict",
            "-n",
            min=-1,
            help="Tokens to generate where a request does not say; -1: until the end or a full context.",
            rich_help_panel=SAMPLING,
        ),
    ] = -1,
    template_file: shared.TemplateFileOption = None,
    chat_var: shared.ChatVarOption = None,
    *,
    opening: Opening,
    sampling: Annotated[Sampling, Without("stop", "stop_token_ids", "ignore_eos", "logit_bias")],
    cluster: Cluster,
) -> int:
    """Serve models over HTTP, for software that speaks the APIs of OpenAI, Anthropic, Ollama or llama.cpp."""
    from engine.serve.settings import ServeSettings

    sampling.params()  # refuse bad settings before anything is opened
    settings = ServeSettings(
        host=host,
        port=port,
        api_keys=(*(api_key or ()), *_keys(api_key_file)),
        cors_origins=tuple(cors_origin or ()),
        max_waiting=max_waiting,
        max_body=int(max_body * (1 << 20)),
        max_connections=max_connections,
        read_timeout=read_timeout,
        keep_alive=keep_alive,
        ping=ping,
        deadline=deadline,
        grace=grace,
        max_models=max_models,
        idle=idle,
        metrics_style=metrics_style,
        slots=slots,
        page=page,
        log_requests=log_requests,
        show_prompts=verbose,
        sampling=sampling.settings(),
        max_tokens=None if max_tokens == -1 else max_tokens,
        template_variables=parse_variables(chat_var),
    )
    opening.config(None)  # as above
    engine_settings = opening.settings()
    if template_file is not None:
        engine_settings["chat_template"] = read_text(template_file)
    specs = model_specs(model or [], alias or [], models_dir, engine_settings)
    with warnings_shown():
        if verbose:
            logging.getLogger("engine").setLevel(logging.DEBUG)
        if settings.open_to_others:
            note(
                f"WARNING: {settings.host} lets every machine that reaches this one use the server; ask for a key with "
                "--api-key-file, or listen on 127.0.0.1"
            )
        if cluster.ray:
            return _serve_replicas(specs, settings, cluster, opening)
        return _serve(specs, settings)


def _serve_replicas(specs: list[ModelSpec], settings: ServeSettings, cluster: Cluster, opening: Opening) -> int:
    from engine.serve.server import bind

    chosen = cluster.settings(device=opening.device, threads=opening.threads)
    port = settings.port
    if cluster.ray_address is None:
        sockets = bind(settings.host, port)  # refuses here what Ray would refuse in another process
        port = sockets[0].getsockname()[1]
        for one in sockets:
            one.close()
    elif port == 0:
        raise InvalidRequestError("--port is 0; with --ray-address give the port that every machine of it listens on")
    from engine.cluster.launch import run

    with ExitStack() as starting:
        starting.enter_context(status("starting the replicas ..."))

        def ready() -> None:
            starting.close()
            _tell(specs, settings, port)

        run(specs, replace(settings, port=port), chosen, address=cluster.ray_address, ready=ready)
    return 0


def _serve(specs: list[ModelSpec], settings: ServeSettings) -> int:
    import asyncio

    from engine.serve.server import bind, serve
    from engine.serve.serving import Serving

    sockets = bind(settings.host, settings.port)
    port = sockets[0].getsockname()[1]

    def ready() -> None:
        starting.close()
        _tell(specs, settings, port)

    def ending(running: int) -> None:
        note(f"waiting for running requests ({running}), at most {settings.grace:g} s; Ctrl-C again does not wait")

    async def run() -> str | None:
        return await serve(Serving(specs, settings, owns_process=True), sockets, ready, ending=ending)

    with ExitStack() as starting:
        starting.enter_context(status("starting ..."))
        problem = asyncio.run(run())
    if problem is not None:
        raise EngineError(problem)
    return 0


def _tell(specs: list[ModelSpec], settings: ServeSettings, port: int) -> None:
    """Where the server is and how it is called."""
    host = settings.host.split(",")[0].strip()
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::', '') else f'[{host}]' if ':' in host else host}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if settings.api_keys else ""
    names = ", ".join(spec.name for spec in specs)
    write(f"serving {names}\n  page: {url}/\n  API:  {url}/v1\n")
    body = '{"prompt": "Once upon a time", "max_tokens": 32}'
    write(f"  curl {url}/v1/completions{key} -d '{body}'\n")


def model_specs(
    models: list[str], aliases: list[str], folder: Path | None, settings: dict[str, Any]
) -> list[ModelSpec]:
    """The models that the options name.

    Raises:
        InvalidRequestError: too many aliases, a name that two models have, or a folder without models.
    """
    from engine.serve.models.model_store import ModelNames, ModelSpec, name_of

    sources: list[str | None] = [*models]
    if folder is not None:
        sources += _files(folder)
    if not sources:
        sources = [None]
    if len(aliases) > len(sources):
        raise InvalidRequestError(f"{len(aliases)} times --alias, but {len(sources)} models; give one for each model")
    specs = []
    for index, source in enumerate(sources):
        names = [name.strip() for name in aliases[index].split(",")] if index < len(aliases) else [name_of(source)]
        if not all(names):
            raise InvalidRequestError(f"--alias is {aliases[index]!r}; names must not be empty")
        specs.append(ModelSpec(names[0], source, tuple(names[1:]), settings))
    ModelNames(specs)  # refuses names that two models have
    return specs


def _files(folder: Path) -> list[str]:
    """The GGUF files of a folder, of split ones the first part."""
    if not folder.is_dir():
        raise InvalidRequestError(f"--models-dir {folder} is not a folder")
    found = []
    for path in sorted(folder.rglob("*.gguf")):
        part = part_name(path.name)
        if (part is None or part.number == 1) and not path.name.startswith("mmproj"):
            found.append(str(path))
    if not found:
        raise InvalidRequestError(f"--models-dir {folder} holds no GGUF file")
    return found


def _keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    lines = (line.strip() for line in read_text(path).splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise InvalidRequestError(f"--api-key-file {path} holds no key: anyone could use the server")
    return keys
