"""The page for chatting at /: one HTML file with its style and scripts, all from this server.

A model's output is hostile until shown otherwise. The scripts make text nodes of it and nothing else, and the policy
below makes the browser refuse what they might overlook: scripts and styles inside the page, markup made from strings,
anything from or to other hosts, frames.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request, Response

from engine.serve.errors import ApiError
from engine.serve.serving import Serving

FOLDER = Path(__file__).parent
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "markdown.js": "text/javascript; charset=utf-8",
    "store.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""Sent with the page and each of its parts; no-cache: browsers ask whether a part changed, by its ETag."""


def router(serving: Serving) -> APIRouter:
    """GET / and the parts of the page under /static/, which need no key."""
    routes = APIRouter(include_in_schema=False)

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        if not serving.settings.page:
            raise ApiError(404, "this server was started with --no-page")
        return _file(request, "index.html")

    @routes.api_route("/static/{name}", methods=["GET", "HEAD"])
    async def part(request: Request, name: str) -> Response:
        if not serving.settings.page or name not in TYPES:
            raise ApiError(404, f"there is no {request.method} {request.url.path}")
        return _file(request, name)

    return routes


def _file(request: Request, name: str) -> Response:
    content = (FOLDER / name).read_bytes()
    headers = {**HEADERS, "ETag": f'"{sha256(content).hexdigest()[:32]}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=TYPES[name], headers=headers)
