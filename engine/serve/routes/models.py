"""GET /v1/models and what the server says about itself: /health, /version, /metrics, /props, /slots."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter, Request, Response

from engine import __version__
from engine.api.llm import LLM
from engine.sampling.params import SamplingParams
from engine.serve.answers.wording import FINGERPRINT
from engine.serve.errors import ApiError, json_response
from engine.serve.metrics import occupancies
from engine.serve.models.loading import LoadProgress
from engine.serve.models.model_store import ServedModel
from engine.serve.serving import Serving


def router(serving: Serving) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()
    serving.store.describe = lambda model: props_of(serving, model)

    @routes.get("/v1/models")
    @routes.get("/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [model_entry(one) for one in serving.store.models]})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        known = [one for one in serving.store.models if name in (one.spec.name, *one.spec.aliases)]
        if not known:
            raise ApiError(404, f"there is no model {name!r}", param="model", code="model_not_found")
        return json_response(model_entry(known[0]))

    @routes.get("/health")
    @routes.get("/v1/health")
    async def health() -> Response:
        return json_response(*health_of(serving))

    @routes.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(
            serving.metrics.text(),
            media_type="text/plain; version=0.0.4; charset=utf-8",
            headers={"Process-Start-Time-Unix": str(int(serving.started))},
        )

    @routes.get("/props")
    async def props(request: Request) -> Response:
        name = request.query_params.get("model")
        model = serving.store.find(name)
        if model.props is None:  # never opened
            serving.store.release(await serving.store.acquire(name))
        # A question is no use of the model: a monitor must not keep it from being closed.
        return json_response({**(model.props or {}), "is_sleeping": model.llm is None})

    @routes.get("/slots")
    async def slots(request: Request) -> Response:
        if not serving.settings.slots:
            raise ApiError(501, "this server was started with --no-slots")
        entries = slots_of(serving, request.query_params.get("model"))
        if request.query_params.get("fail_on_no_slot") and all(one["is_processing"] for one in entries):
            raise ApiError(503, "every slot is in use", code="no_slot_available")
        return json_response(entries)

    return routes


def health_of(serving: Serving) -> tuple[dict[str, Any], int]:
    """Whether the server can serve, as an object and a status.

    A server of one model is ready when that model is open, one of several at once.
    """
    store = serving.store
    for model in store.models:
        if model.llm is not None and (failure := model.llm.failure) is not None:
            return _unhealthy("failed", f"the device of {model.spec.name} failed: {failure}"), 503
    if serving.draining:
        return _unhealthy("draining", "the server is shutting down"), 503
    if any(one.llm is not None for one in store.models):
        return {"status": "ok"}, 200
    loading = [one.progress for one in store.models if one.progress is not None]
    if not loading and len(store.models) == 1 and store.models[0].props is None:
        loading = [LoadProgress()]  # the socket answers before the first model is begun
    if not loading:
        return {"status": "ok"}, 200
    value = _unhealthy("loading", f"Loading model: {loading[0].text}")
    return {**value, "progress": round(loading[0].fraction, 3)}, 503


def _unhealthy(status: str, message: str) -> dict[str, Any]:
    return {"status": status, "error": {"message": message, "type": "unavailable_error", "code": 503}}


def model_entry(model: ServedModel) -> dict[str, Any]:
    """One entry of the list of models, with what is known of it while it is closed as well."""
    entry: dict[str, Any] = {
        "id": model.spec.name,
        "object": "model",
        "created": model.created,
        "owned_by": "gguf-engine",
        "aliases": list(model.spec.aliases),
        "status": {"value": "loaded" if model.llm is not None else "unloaded"},
    }
    if model.llm is not None:
        llm = model.llm.llm
        config = llm.model.config
        entry["max_model_len"] = llm.context_length
        entry["meta"] = {
            "n_ctx_train": config.context_length,
            "n_vocab": config.vocab_size,
            "n_embd": config.width,
            "size": llm.memory_plan().weights_bytes,
        }
    return entry


def props_of(serving: Serving, model: ServedModel) -> dict[str, Any]:
    """llama.cpp's description of an open model and its defaults."""
    llm = model.open_llm.llm
    defaults = SamplingParams(**{**serving.settings.sampling, "max_tokens": serving.settings.max_tokens})
    return {
        "default_generation_settings": {
            "n_ctx": llm.context_length,
            "params": generation_settings(defaults, defaults.seed, llm),
        },
        "total_slots": llm.max_sequences,
        "model_alias": model.spec.name,
        "model_path": str(llm.config.model),
        "modalities": {"vision": False, "audio": False},
        "chat_template": chat_source(llm),
        "bos_token": _special(llm, "bos"),
        "eos_token": _special(llm, "eos"),
        "build_info": FINGERPRINT,
        "device": llm.device,
        "is_sleeping": False,
    }


def chat_source(llm: LLM) -> str:
    """The text of the model's chat template; empty where it has none."""
    try:
        return llm.require_chat_template().source
    except Exception:
        return ""


def _special(llm: LLM, role: str) -> str:
    if not llm.has_tokenizer or role not in llm.tokenizer.special_ids:
        return ""
    return llm.tokenizer.token_text(llm.tokenizer.special_ids[role])


def generation_settings(params: SamplingParams, seed: int | None, llm: LLM) -> dict[str, Any]:
    """Sampling parameters under llama.cpp's names; a forbidden token has the bias null."""
    n_predict = -1 if params.max_tokens is None else params.max_tokens
    biases = {token_id: bias if math.isfinite(bias) else None for token_id, bias in (params.logit_bias or {}).items()}
    if params.ignore_eos and llm.has_tokenizer:
        biases.update(dict.fromkeys(sorted(llm.tokenizer.eog_ids)))
    return {
        "n_predict": n_predict,
        "max_tokens": n_predict,
        "seed": -1 if seed is None else seed,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "typical_p": params.typical_p,
        "repeat_last_n": params.penalty_last_n,
        "repeat_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "stop": list(params.stop),
        "ignore_eos": params.ignore_eos,
        "n_probs": params.logprobs or 0,
        "logit_bias": [{"token": token_id, "bias": bias} for token_id, bias in biases.items()],
        "adaptive_target": -1.0,
        "adaptive_decay": 0.9,
    }


def slots_of(serving: Serving, name: str | None) -> list[dict[str, Any]]:
    """Every slot of the open models, busy or not."""
    wanted = None if name is None else serving.store.find(name)
    entries: list[dict[str, Any]] = []
    for model, now in occupancies(serving.store):
        if wanted is not None and model is not wanted:
            continue
        assert model.llm is not None, "occupancies() gives open models"
        llm, used = model.llm.llm, {one.slot: one for one in now.slots}
        for slot in range(llm.max_sequences):
            entry: dict[str, Any] = {
                "id": slot,
                "model": model.spec.name,
                "n_ctx": llm.context_length,
                "is_processing": slot in used,
            }
            if slot in used:
                one = used[slot]
                entry |= {
                    "id_task": one.request_id,
                    "n_prompt_tokens": one.prompt_tokens,
                    "n_prompt_tokens_processed": min(one.done_tokens, one.prompt_tokens),
                    "n_prompt_tokens_cache": one.cached_tokens,
                    "n_decoded": one.output_tokens,
                }
            entries.append(entry)
    return entries
