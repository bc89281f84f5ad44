"""Embeddings and rankings: OpenAI's /v1/embeddings, llama.cpp's /embedding, Jina's and Cohere's /rerank, Ollama's."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from engine.api.embedding.embeddings import Asked, EmbeddingRequest
from engine.api.llm import LLM
from engine.errors import InvalidRequestError
from engine.serve.answers.long_work import written
from engine.serve.answers.respond import whole
from engine.serve.answers.wording import new_id
from engine.serve.errors import ApiError, as_api_error, json_response
from engine.serve.fields.body import Body, read_body
from engine.serve.run import Run
from engine.serve.serving import Serving

MOST_INPUTS = 4096
"""Texts of one request."""

FIELDS = ("input", "dimensions", "pooling", "instruction", "query", "documents", "top_n")


class EmbeddingBody(Body):
    """The fields of /v1/embeddings and of llama.cpp's /embedding."""

    model: str | None = None
    input: Any = None
    content: Any = None
    encoding_format: str | None = None
    dimensions: int | None = None
    pooling: str | None = None
    instruction: str | None = None
    embd_normalize: int | None = None
    truncate: bool = False


class RerankBody(Body):
    """The fields of /v1/rerank: Jina's, Cohere's and llama.cpp's, and `texts` of Hugging Face's server."""

    model: str | None = None
    query: str = ""
    documents: list[Any] | None = None
    texts: list[Any] | None = None
    top_n: int | None = None
    return_documents: bool = False
    return_text: bool = False


class OllamaBody(Body):
    """The fields of /api/embed and of the older /api/embeddings."""

    model: str | None = None
    input: Any = None
    prompt: str | None = None
    truncate: bool = True
    dimensions: int | None = None


def router(serving: Serving) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()

    async def embed(request: Request) -> Response:
        body = await read_body(request, EmbeddingBody)
        openai = request.url.path.startswith("/v1/")
        if body.encoding_format not in (None, "float", "base64"):
            message = f"encoding_format is {body.encoding_format!r}; allowed are 'float' and 'base64'"
            raise ApiError(400, message, param="encoding_format", code="invalid_value")
        texts = _inputs(body.input if body.input is not None else body.content, "input")
        settings: dict[str, Any] = {
            name: getattr(body, name) for name in ("dimensions", "pooling", "instruction", "truncate")
        }
        if body.embd_normalize is not None:  # llama.cpp: 2 is the Euclidean length, -1 none
            if body.embd_normalize not in (-1, 2):
                message = (
                    f"embd_normalize is {body.embd_normalize}; supported are 2 (by the Euclidean length) and -1 (not)"
                )
                raise ApiError(400, message, param="embd_normalize", code="invalid_value")
            settings["normalize"] = body.embd_normalize == 2
        run = Run(serving, body.model)
        asked, found = await _embed(request, run, lambda llm: llm.embeddings.request(texts, **settings))
        name, write = _name(run, body.model), _base64 if body.encoding_format == "base64" else _numbers

        def answer() -> Response:
            if not openai:
                return written([_plain(i, vector) for i, vector in enumerate(found)])
            data = [{"object": "embedding", "index": i, "embedding": write(vector)} for i, vector in enumerate(found)]
            return written({"object": "list", "data": data, "model": name, "usage": _usage(asked)})

        return await asyncio.to_thread(answer)  # thousands of vectors are millions of numbers

    async def rerank(request: Request) -> Response:
        body = await read_body(request, RerankBody)
        given = body.documents if body.documents is not None else body.texts
        if len(given or ()) > MOST_INPUTS:
            raise _too_many(len(given or ()), "documents")
        documents = [_text(one, i) for i, one in enumerate(given or ())]
        if not body.query or not documents:
            missing = "query" if not body.query else "documents"
            raise ApiError(400, f"the field {missing} is missing or empty", param=missing, code="invalid_value")
        run = Run(serving, body.model)
        asked, scores = await _embed(
            request, run, lambda llm: llm.embeddings.ranking(body.query, documents, body.top_n)
        )
        best = asked.ranked(scores)
        if body.documents is None:
            text = [{"text": one.document} if body.return_text else {} for one in best]
            return json_response(
                [{"index": one.index, "score": one.score, **more} for one, more in zip(best, text, strict=True)]
            )
        results: list[dict[str, Any]] = [{"index": one.index, "relevance_score": one.score} for one in best]
        if body.return_documents:
            results = [{**one, "document": {"text": documents[one["index"]]}} for one in results]
        return json_response(
            {
                "id": new_id("rerank-"),
                "object": "list",
                "model": _name(run, body.model),
                "usage": _usage(asked),
                "results": results,
            }
        )

    for path in ("/v1/embeddings", "/embeddings", "/embedding"):
        routes.add_api_route(path, embed, methods=["POST"], name=path)
    for path in ("/v1/rerank", "/v1/reranking", "/v2/rerank", "/rerank", "/reranking"):
        routes.add_api_route(path, rerank, methods=["POST"], name=path)

    @routes.post("/api/embed")
    async def api_embed(request: Request) -> Response:
        body, begin = await read_body(request, OllamaBody), time.perf_counter()
        texts = _inputs(body.input, "input") if body.input not in (None, "") else []
        run = Run(serving, body.model)
        asked, found = await _embed(
            request,
            run,
            lambda llm: llm.embeddings.request(texts, dimensions=body.dimensions, truncate=body.truncate),
        )
        name, seconds = _name(run, body.model), time.perf_counter() - begin

        def answer() -> Response:
            return written(
                {
                    "model": name,
                    "embeddings": [_numbers(vector) for vector in found],
                    "total_duration": int(seconds * 1e9),
                    "load_duration": 0,
                    "prompt_eval_count": asked.n_tokens,
                }
            )

        return await asyncio.to_thread(answer)

    @routes.post("/api/embeddings")
    async def api_embeddings(request: Request) -> Response:
        body = await read_body(request, OllamaBody)
        if not body.prompt:
            return json_response({"embedding": []})
        run, texts = Run(serving, body.model), [body.prompt]
        _, found = await _embed(
            request, run, lambda llm: llm.embeddings.request(texts, truncate=body.truncate, normalize=False)
        )
        return json_response({"embedding": _numbers(found[0])})

    return routes


async def _embed(request: Request, run: Run, make: Callable[[LLM], Asked]) -> tuple[Asked, list[np.ndarray]]:
    """What make() asks of the model, and the results; a client that leaves ends it.

    Raises:
        ApiError: 400, with the field that is wrong; or a result holds numbers that are not finite.
    """

    async def work() -> tuple[Asked, list[np.ndarray]]:
        await run.open()
        return await run.embed(make)

    try:
        asked, found = await whole(request, work)
    except InvalidRequestError as error:
        raise as_api_error(error, {name: name for name in FIELDS}) from None
    finally:
        run.close()
    if not all(np.isfinite(vector).all() for vector in found):
        raise ApiError(500, "the model gave numbers that are not finite; its file may be damaged", code="engine_error")
    return asked, found


def _inputs(given: Any, field: str) -> list[Any]:
    """The texts of a request, each a text or a list of token ids.

    Raises:
        ApiError: none, too many, or something else.
    """
    if isinstance(given, str) or _are_ids(given):
        given = [given]
    if isinstance(given, list) and len(given) > MOST_INPUTS:
        raise _too_many(len(given), field)
    if not isinstance(given, list) or not given or not all(isinstance(one, str) or _are_ids(one) for one in given):
        message = f"{field} must be a text, a list of token ids, or a list of these that is not empty"
        raise ApiError(400, message, param=field, code="invalid_type")
    return given


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}  # a tenth of the time of a loop


def _too_many(n: int, field: str) -> ApiError:
    message = f"{field} has {n} entries; this server takes at most {MOST_INPUTS} at a time"
    return ApiError(400, message, param=field, code="invalid_value")


def _text(document: Any, index: int) -> str:
    """A document given as text or, in Cohere's older form, as an object."""
    text = document.get("text") if isinstance(document, dict) else document
    if not isinstance(text, str):
        raise ApiError(400, f"documents[{index}] must be a text", param=f"documents[{index}]", code="invalid_type")
    return text


def _numbers(vector: np.ndarray) -> list[Any]:
    numbers: list[Any] = vector.tolist()
    return numbers


def _base64(vector: np.ndarray) -> str:
    """Little-endian float32, as OpenAI's clients decode it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _plain(index: int, vector: np.ndarray) -> dict[str, Any]:
    """llama.cpp's own form: a list of vectors, which is one unless there is one per token."""
    return {"index": index, "embedding": np.atleast_2d(vector).tolist()}


def _usage(asked: EmbeddingRequest) -> dict[str, int]:
    return {"prompt_tokens": asked.n_tokens, "total_tokens": asked.n_tokens}


def _name(run: Run, asked: str | None) -> str:
    return asked or run.model.spec.name
