"""The application: all endpoints and what surrounds them. Knows no sockets."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from engine import __version__
from engine.serve import page
from engine.serve.errors import ApiError, as_api_error, error_response
from engine.serve.middleware import Gate
from engine.serve.routes import chat, completion, completions, embeddings, messages, models, ollama, responses, text
from engine.serve.serving import Serving

log = logging.getLogger("engine.serve")


def make_app(serving: Serving) -> ASGIApp:
    """The ASGI application of a server."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with serving.alive():
            yield

    app = FastAPI(
        title="gguf-engine",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for one in (models, completions, chat, responses, messages, ollama, completion, embeddings, text):
        app.include_router(one.router(serving))
    app.include_router(page.router(serving))
    _add_errors(app)
    gate: ASGIApp = Gate(app, serving)
    origins = serving.settings.cors_origins
    if origins:  # outside the gate: browsers ask for permission without a key
        gate = CORSMiddleware(
            gate,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE", "OPTIONS"],
            allow_headers=["*"],
            allow_credentials="*" not in origins,
        )
    return gate


def _add_errors(app: FastAPI) -> None:
    async def refuse(request: Request, error: Exception) -> Response:
        found = as_api_error(error)
        if found.code == "internal_error":
            log.error("%s %s failed: %s", request.method, request.url.path, error, exc_info=error)
        return error_response(found, request.url.path)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path}"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        else:
            message = str(error.detail)
        found = ApiError(error.status_code, message, headers=error.headers)
        return error_response(found, request.url.path)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    from engine.errors import EngineError

    for kind in (ApiError, EngineError, MemoryError, ValueError, RuntimeError, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientDisconnect, gone)
