"""Endpoints that other servers have and this one does not yet; a clear answer beats a missing path."""

from __future__ import annotations

from fastapi import APIRouter, Response

from engine.serve.errors import ApiError

REASONS = {
    "/v1/embeddings": "embedding models are not supported yet; this server generates text",
    "/embeddings": "embedding models are not supported yet; this server generates text",
    "/v1/rerank": "reranking models are not supported yet; this server generates text",
    "/rerank": "reranking models are not supported yet; this server generates text",
    "/api/embed": "embedding models are not supported yet; this server generates text",
    "/api/embeddings": "embedding models are not supported yet; this server generates text",
}


def router() -> APIRouter:
    """The endpoints."""
    routes = APIRouter()

    def refuse(reason: str) -> Response:
        raise ApiError(501, reason, code="not_supported")

    for path, reason in REASONS.items():

        async def endpoint(reason: str = reason) -> Response:
            return refuse(reason)

        routes.add_api_route(path, endpoint, methods=["POST"], name=path)
    return routes
