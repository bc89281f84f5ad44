"""The models that a server knows: opened on first use, closed when others need the memory or after a time without use.

A model in use is never closed. All state belongs to the event loop's thread; opening and closing run in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.api.asynchronous.async_llm import AsyncLLM
from engine.api.llm import BUNDLED_MODEL, LLM
from engine.errors import DeviceError, EngineError, InvalidRequestError
from engine.serve.errors import ApiError
from engine.serve.models.fetching import local_source
from engine.serve.models.loading import LoadProgress
from engine.serve.models.memory import bytes_free, bytes_needed
from engine.split_names import part_name

log = logging.getLogger("engine.serve")


def name_of(source: str | None) -> str:
    """What clients call a model unless somebody says otherwise: the file's name without its end.

    Args:
        source: see ModelSpec.
    """
    if source is None:
        return BUNDLED_MODEL.stem
    if not source.endswith(".gguf"):
        return source.removeprefix("hf:")
    path = Path(source)
    part = part_name(path.name)
    return path.stem if part is None else part.stem


@dataclass(frozen=True)
class ModelSpec:
    """A model by its names.

    Attributes:
        name: what clients call it.
        source: a file, or what else LLM() opens; None is the bundled model.
        aliases: further names.
        settings: further arguments of LLM().
    """

    name: str
    source: str | None = None
    aliases: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path | None:
        """The file, where the source is one."""
        if self.source is None:
            return BUNDLED_MODEL
        path = Path(self.source)
        return path if path.is_file() else None


class ModelNames:
    """Which model is meant by a name that a client gives.

    Args:
        specs: the models; the first one is meant where no name is given.

    Raises:
        InvalidRequestError: a name that two models have.
    """

    def __init__(self, specs: Sequence[ModelSpec]) -> None:
        self._specs = specs
        self._by_name: dict[str, ModelSpec] = {}
        for spec in specs:
            for name in (spec.name, *spec.aliases):
                if self._by_name.setdefault(name, spec) is not spec:
                    raise InvalidRequestError(f"two models have the name {name!r}; give each its own with --alias")

    def find(self, name: str | None) -> ModelSpec | None:
        """The model of a name, or None. The only model has any name, as clients often have one built in."""
        if name is not None and (found := self._by_name.get(name) or self._by_name.get(name.removesuffix(":latest"))):
            return found
        return self._specs[0] if name in (None, "") or not self.several else None

    @property
    def several(self) -> bool:
        """Whether there is more than one model."""
        return len(self._specs) > 1


@dataclass(frozen=True)
class Counts:
    """Numbers of a model that only grow.

    Attributes:
        steps: steps that gave tokens.
        tokens: tokens that they gave.
        preemptions: sequences preempted.
    """

    steps: int = 0
    tokens: int = 0
    preemptions: int = 0


class ServedModel:
    """One model of a server, open or not.

    Attributes:
        spec: its names and file.
        llm: the open model; None while it is closed.
        progress: how far it has been opened; None while no thread opens it.
        users: requests that use it or wait for it.
        sequences: sequences that those requests have asked for.
        created: when the server got to know it, in seconds since 1970.
        props: what describe() of the store said when it was opened last; None before.
        before: what was counted until it was closed last.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.llm: AsyncLLM | None = None
        self.progress: LoadProgress | None = None
        self.users = 0
        self.sequences = 0
        self.props: dict[str, Any] | None = None
        self.before = Counts()
        self.created = int(time.time())
        self.last_used = time.monotonic()
        self._opening: asyncio.Task[None] | None = None

    @property
    def counts(self) -> Counts:
        """What was counted since the server began, also while the model was open before."""
        if self.llm is None:
            return self.before
        before, preemptions = self.before, self.llm.llm.occupancy().preemptions
        return Counts(
            before.steps + self.llm.n_steps, before.tokens + self.llm.n_tokens, before.preemptions + preemptions
        )

    @property
    def open_llm(self) -> AsyncLLM:
        """The open model; to be called by its users alone."""
        assert self.llm is not None, "a model in use is open"
        return self.llm


class ModelStore:
    """All models of a server.

    Args:
        specs: the models; the first one is meant where a request names none.
        max_models: how many may be open at a time; None: as many as the memory holds.
        idle: seconds after which an unused model is closed; None: never.
        open_llm: opens a model; for tests.
        settled: called whenever a model has been opened or closed.

    Attributes:
        models: in their order.
        describe: makes what is told of a model; kept when it is closed, so that a question does not open it again.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        *,
        max_models: int | None = None,
        idle: float | None = None,
        open_llm: Callable[..., LLM] = LLM,
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        self.models = [ServedModel(spec) for spec in specs]
        self.describe: Callable[[ServedModel], dict[str, Any]] = lambda model: {}
        self._names = ModelNames(specs)
        self._max_models = max_models
        self._idle = idle
        self._open_llm = open_llm
        self._settled = settled
        self._released = asyncio.Condition()
        self._room = asyncio.Lock()  # one model is opened at a time: each looks at the memory that is left
        self._closing: set[asyncio.Task[None]] = set()

    def find(self, name: str | None) -> ServedModel:
        """The model of a name, as ModelNames understands it.

        Raises:
            ApiError: 404.
        """
        spec = self._names.find(name)
        if spec is not None:
            return next(model for model in self.models if model.spec is spec)
        known = ", ".join(model.spec.name for model in self.models)
        raise ApiError(404, f"there is no model {name!r}; there are: {known}", param="model", code="model_not_found")

    def is_open(self, name: str | None) -> bool:
        """Whether acquire() has nothing to wait for.

        Raises:
            ApiError: 404.
        """
        return self.find(name).llm is not None

    @property
    def opened(self) -> list[str]:
        """Names of the models that are open or being opened."""
        return [model.spec.name for model in self.models if model.llm is not None or model.progress is not None]

    async def acquire(self, name: str | None) -> ServedModel:
        """The open model of a name, in use until release(); opens it where it is closed.

        Raises:
            ApiError: 404; or 500 where it cannot be opened.
        """
        model = self.find(name)
        model.users += 1
        try:
            while model.llm is None:
                await self._open(model)
        except BaseException:
            self.release(model)
            raise
        model.last_used = time.monotonic()
        return model

    def release(self, model: ServedModel) -> None:
        """One user of the model less."""
        model.users -= 1
        model.last_used = time.monotonic()
        if model.users == 0:
            self._closing.add(task := asyncio.ensure_future(self._tell_released()))
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all models."""
        for model in self.models:
            if model._opening is not None:
                model._opening.cancel()
            await self._put_away(model)

    async def watch_idle(self) -> None:
        """Close models that were not used for long enough; runs until it is cancelled."""
        while self._idle is not None:
            await asyncio.sleep(min(max(self._idle / 4, 0.05), 5.0))
            for model in self.models:
                if model.llm is not None and not model.users and time.monotonic() - model.last_used >= self._idle:
                    log.info("closing %s: not used for %g s", model.spec.name, self._idle)
                    await self._put_away(model)

    async def _open(self, model: ServedModel) -> None:
        """Open a model, or wait for the one task that does; a caller that is cancelled does not stop it."""
        if model._opening is None:
            model._opening = asyncio.ensure_future(self._open_now(model))
            model._opening.add_done_callback(lambda done: _forget(model, done))
        await asyncio.shield(model._opening)

    async def _open_now(self, model: ServedModel) -> None:
        async with self._room:
            await self._make_room(model)
            while True:
                progress = model.progress = LoadProgress()
                try:
                    source = await local_source(model.spec.source, progress.tell)
                    model.llm = await asyncio.to_thread(self._load, source, model.spec, progress)
                    model.props = self.describe(model)
                    progress.done()
                    log.info("opened %s in %.2f s", model.spec.name, model.llm.llm.load_seconds)
                    return
                except (DeviceError, MemoryError) as error:
                    model.progress = None
                    if not await self._evict(model):
                        raise ApiError(500, f"{model.spec.name} cannot be opened: {error}") from error
                except (EngineError, OSError) as error:
                    model.progress = None
                    raise ApiError(500, f"{model.spec.name} cannot be opened: {error}") from error

    def _load(self, source: str | Path | None, spec: ModelSpec, progress: LoadProgress) -> AsyncLLM:
        llm = self._open_llm(source, **spec.settings, status=progress.tell)
        llm.prepare_constraints()
        self._settled()
        return AsyncLLM(llm)

    async def _make_room(self, model: ServedModel) -> None:
        """Close models until the new one may be opened; waits for their users where all are in use."""
        while self._max_models is not None and self._n_open() >= self._max_models:
            if not await self._evict(model):
                async with self._released:
                    await self._released.wait_for(lambda: any(self._closable(model)))
        if self._n_open() and model.spec.path is not None:
            needed = await asyncio.to_thread(bytes_needed, model.spec.path, model.spec.settings)
            while needed is not None and (free := bytes_free()) is not None and free < needed:
                if not await self._evict(model):
                    return

    def _n_open(self) -> int:
        return sum(model.llm is not None for model in self.models)

    def _closable(self, wanted: ServedModel) -> list[ServedModel]:
        """Open models without users, least recently used first."""
        free = [one for one in self.models if one is not wanted and one.llm is not None and not one.users]
        return sorted(free, key=lambda one: one.last_used)

    async def _evict(self, wanted: ServedModel) -> bool:
        """Close the model that was not used for longest; False where every open one is in use."""
        free = self._closable(wanted)
        if not free:
            return False
        log.info("closing %s to open %s", free[0].spec.name, wanted.spec.name)
        await self._put_away(free[0])
        return True

    async def _put_away(self, model: ServedModel) -> None:
        model.before = model.counts
        llm, model.llm, model.progress = model.llm, None, None
        if llm is not None:
            await llm.aclose()
            del llm
            await asyncio.to_thread(self._settled)

    async def _tell_released(self) -> None:
        async with self._released:
            self._released.notify_all()


def _forget(model: ServedModel, done: asyncio.Future[None]) -> None:
    model._opening = None
    if not done.cancelled():
        done.exception()  # taken note of: each waiting request raises it
