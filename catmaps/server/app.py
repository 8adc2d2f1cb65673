"""The routes of the server. Needs the extra `serve`."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pydantic_core
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from catmaps import __version__
from catmaps.allocator import hand_back_freed_memory
from catmaps.server import asks
from catmaps.server.answers import Answers
from catmaps.server.guard import Guard
from catmaps.server.limits import ApiError
from catmaps.server.page import live_page
from catmaps.server.schema import CompletionRequest
from catmaps.server.service import Service
from catmaps.server.writing import Choice, Writer

LOG = logging.getLogger("catmaps.server")
BODY_SECONDS = 10.0
"""For a client to send a request."""
TIDY_SECONDS = 30.0
"""Between two times that freed memory is handed back: else a server keeps the most that batches ever took at once."""


def create_app(service: Service) -> FastAPI:
    """The application; ending it finishes what is queued."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(_tidying())
        yield
        tidying.cancel()
        service.closing = True
        await asyncio.to_thread(service.batcher.close)

    # The interactive pages of FastAPI load scripts from elsewhere: none.
    app = FastAPI(title="catmaps", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, service=service)
    _errors(app)
    _pages(app, service)
    body = {"required": True, "content": {"application/json": {"schema": CompletionRequest.model_json_schema()}}}

    @app.post("/v1/completions", openapi_extra={"requestBody": body})
    async def completions(request: Request) -> Response:
        """Texts, in OpenAI's form."""
        asked = _parsed(await _body(request, service.limits.body))
        # Tokenizing much text takes its time: not in the loop.
        ask = await asyncio.to_thread(asks.read, asked, service.run, service.model, service.limits)
        answers = Answers(ask, service.model, service.fingerprint, service.run.tokenizer, service.strings)
        if ask.stream:
            return await _streamed(service, ask, answers)
        with service.admitted(ask.choices):
            writer = Writer(service.run, service.batcher, ask)
            try:
                choices = await _unless_gone(request, writer, service.limits.seconds)
            finally:
                writer.close()
        service.metrics.texts(len(choices), sum(len(choice.ids) for choice in choices))
        return JSONResponse(answers.whole(choices))

    return app


async def _tidying() -> None:
    while True:
        await asyncio.sleep(TIDY_SECONDS)
        await asyncio.to_thread(hand_back_freed_memory)


def _pages(app: FastAPI, service: Service) -> None:
    page, policy = live_page(service.run, service.model, service.limits)

    @app.get("/", include_in_schema=False)
    async def show() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether it serves."""
        if service.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return {"status": "ok", "model": service.model}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """Counters, as Prometheus reads them."""
        text = service.metrics.text(active=service.active, queued=service.batcher.queued)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        """What it is."""
        if model != service.model:
            raise ApiError(404, f"no model {model[:80]!r} here", param="model", code="model_not_found")
        return _model(service)


def _model(service: Service) -> dict[str, Any]:
    run = service.run
    return {
        "id": service.model,
        "object": "model",
        "created": 0,
        "owned_by": "catmaps",
        "kind": run.kind,
        "window": run.config.data.length,
        "vocabulary": run.tokenizer.vocab_size,
        "tokenizer": run.tokenizer.name,
        "system_fingerprint": service.fingerprint,
    }


def _errors(app: FastAPI) -> None:
    """Every error has OpenAI's form."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        del request
        return JSONResponse(error.as_dict(), error.status, {"Retry-After": "1"} if error.status in (429, 503) else None)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        del request
        said = ApiError(error.status_code, str(error.detail))
        return JSONResponse(said.as_dict(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        del request, error  # the log has it
        return JSONResponse(ApiError(500, "an error of the server; its log tells more").as_dict(), 500)


async def _body(request: Request, most: int) -> bytes:
    """The bytes of a JSON request.

    Raises:
        ApiError: Another type, too many bytes, or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be of Content-Type application/json")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise ApiError(413, f"the body has more than {most} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body took more than {BODY_SECONDS:g} seconds to come") from None
    except ClientDisconnect:
        raise ApiError(400, "the client left") from None
    return bytes(data)


def _parsed(data: bytes) -> CompletionRequest:
    try:
        content = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return CompletionRequest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:80]
        raise ApiError(422, f"{place}: {first['msg']}", param=str(first["loc"][0])[:80]) from None


async def _unless_gone(request: Request, writer: Writer, seconds: float) -> list[Choice]:
    """The texts; given up when the client leaves or time is up."""
    work = asyncio.create_task(writer.choices())
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({work, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if gone.done():
            raise ApiError(400, "the client left")
        raise ApiError(503, f"not done in {seconds:g} seconds; ask for less, or later", code="timeout")
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _streamed(service: Service, ask: asks.Ask, answers: Answers) -> Response:
    """Server-sent events: drafts, then each text, then [DONE]."""
    admission = service.admitted(ask.choices)
    admission.__enter__()

    async def events() -> AsyncIterator[str]:
        writer, done = Writer(service.run, service.batcher, ask), list[Choice]()
        try:
            async with asyncio.timeout(service.limits.seconds):
                async for item in writer.stream():
                    said = answers.end(item) if isinstance(item, Choice) else answers.step(item)
                    done += [item] if isinstance(item, Choice) else []
                    yield _event(said)
            if ask.usage:
                yield _event(answers.usage(done))
            yield "data: [DONE]\n\n"
            service.metrics.texts(len(done), sum(len(choice.ids) for choice in done))
        except TimeoutError:
            late = ApiError(503, f"not done in {service.limits.seconds:g} seconds", code="timeout")
            yield _event(late.as_dict())
        except Exception:
            LOG.exception("a stream broke off")
            yield _event(ApiError(500, "an error of the server; its log tells more").as_dict())
        finally:
            writer.close()
            admission.__exit__(None, None, None)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _event(said: dict[str, Any]) -> str:
    return f"data: {json.dumps(said, ensure_ascii=False, allow_nan=False)}\n\n"
