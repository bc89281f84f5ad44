"""How the server behaves, frozen once made. Knows nothing of models or of the web framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.errors import InvalidRequestError

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
METRICS_STYLES = ("vllm", "llamacpp")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Addresses, limits and defaults of a server.

    Attributes:
        host: address to listen on.
        port: port; 0 takes a free one.
        api_keys: keys of which a request must have one; none: no key is asked for.
        cors_origins: origins whose pages may call the server; "*" is all.
        max_waiting: requests that may wait for a place in the batch; further ones get 429.
        max_body: bytes of a request's body.
        max_connections: open connections; further requests get 503.
        read_timeout: seconds within which a request must have arrived, and a client must take what it is sent.
        keep_alive: seconds that an idle connection stays open.
        ping: seconds between the comments that keep a quiet stream of events open.
        deadline: seconds that a request may take, waiting included; None: any time.
        grace: seconds that running requests have after SIGTERM.
        max_models: models that are open at a time; None: as many as the memory holds.
        idle: seconds without a request after which a model is closed; None: never.
        metrics_style: names of the metrics, "vllm" or "llamacpp".
        slots: whether GET /slots answers.
        page: whether GET / answers with the chat page.
        log_requests: write one JSON line for each request to stderr.
        show_prompts: answers of chats have the prompt that the template made under "__verbose".
        sampling: sampling parameters where a request does not say otherwise, by the names of SamplingParams.
        max_tokens: tokens to generate where a request does not say; None: until the end or a full context.
        template_variables: names for the chat template where a request does not set them.

    Raises:
        InvalidRequestError: a value outside its range.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_waiting: int = 256
    max_body: int = 16 << 20
    max_connections: int = 1000
    read_timeout: float = 60.0
    keep_alive: float = 75.0
    ping: float = 15.0
    deadline: float | None = None
    grace: float = 30.0
    max_models: int | None = None
    idle: float | None = None
    metrics_style: str = "vllm"
    slots: bool = True
    page: bool = True
    log_requests: bool = False
    show_prompts: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    template_variables: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole = (("port", 0, 65535), ("max_waiting", 0, None), ("max_body", 1, None), ("max_connections", 1, None))
        for name, low, high in whole:
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                allowed = f"{low} to {high}" if high is not None else f"at least {low}"
                raise InvalidRequestError(f"{name} is {value}; allowed: {allowed}")
        for name in ("read_timeout", "keep_alive", "ping", "deadline", "idle"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidRequestError(f"{name} is {value}; allowed: more than 0 seconds")
        if not self.grace >= 0:
            raise InvalidRequestError(f"grace is {self.grace}; allowed: at least 0 seconds")
        if self.max_models is not None and self.max_models < 1:
            raise InvalidRequestError(f"max_models is {self.max_models}; allowed: at least 1")
        if self.metrics_style not in METRICS_STYLES:
            raise InvalidRequestError(f"metrics_style is {self.metrics_style!r}; allowed: {', '.join(METRICS_STYLES)}")
        if any(not key or not key.isascii() or key != key.strip() for key in self.api_keys):
            raise InvalidRequestError("an API key is empty, has spaces around it or characters outside ASCII")

    @property
    def open_to_others(self) -> bool:
        """Whether other machines reach the server and no key is asked for."""
        return self.host not in LOCAL_HOSTS and not self.api_keys
