"""What stands before every route: who may ask, under which name, and what is counted. Needs the extra `serve`."""

import hmac
import time

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from catmaps.server.limits import ApiError
from catmaps.server.service import Service

OPEN = ("/", "/health")
"""Needs no key: the page asks for it, and a supervisor has none."""
ROUTES = (*OPEN, "/metrics", "/v1/models", "/v1/completions", "/openapi.json")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)


class Guard:
    """Checks host and key, adds headers, counts answers."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a WebSocket is closed by the server when nobody takes it
        began, status = time.monotonic(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, receive, sending)
            else:
                headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
                await JSONResponse(refusal.as_dict(), refusal.status, headers)(scope, receive, sending)
        finally:
            route = scope["path"] if scope["path"] in ROUTES else "other"
            self._service.metrics.request(route, status, time.monotonic() - began)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers, service = Headers(scope=scope), self._service
        # A page elsewhere whose name was made to point here must not read what only this machine may.
        if service.hosts is not None and _name(headers.get("host", "")) not in service.hosts:
            return ApiError(400, "this server does not go by that name: use localhost, or start it with --host")
        if service.api_key is None or scope["path"] in OPEN:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), service.api_key.encode()):
            return None
        return ApiError(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0].lstrip("[").lower()
    return host.partition(":")[0].lower()
