"""The routes."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Header, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skipkernels import __version__
from skipkernels.errors import SkipkernelsError
from skipkernels.server.http.completion_response import CompletionResponse
from skipkernels.server.http.errors import HttpError
from skipkernels.server.http.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from skipkernels.server.http.service import Service

Route = Callable[..., Awaitable[Any]]

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    kind: {"description": "Refused, with the reason.", "content": {"application/json": {"schema": _ERROR}}}
    for kind in ("4XX", "5XX")
}
_PAGE = Path(__file__).with_name("page.html")
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
_REQUEST_ID = "x-request-id"
_COMPRESSED_BYTES = 1024  # from here on it pays


def create_app(service: Service) -> FastAPI:
    """``service`` runs as long as the application does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    async def check_key(authorization: str | None = Header(default=None)) -> None:
        service.check_key(authorization)

    # no interactive documentation: its pages load scripts from other hosts
    app = FastAPI(title="skipkernels", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    guarded = [Depends(check_key)]
    converter = service.converter

    def read(path: str, **options: Any) -> Callable[[Route], Route]:
        def register(route: Route) -> Route:
            app.add_api_route(path, route, methods=["GET"], **({"responses": {**_ERRORS}} | options))
            # two operations of one route would have one id in the OpenAPI document
            app.add_api_route(path, route, methods=["HEAD"], **(options | {"include_in_schema": False}))
            return route

        return register

    def post(path: str, body: type[BaseModel]) -> Any:
        schema = {"content": {"application/json": {"schema": _inlined(body)}}, "required": True}
        answers: dict[int | str, dict[str, Any]] = {**_ERRORS}
        if "stream" in body.model_fields:
            answers[200] = {"content": {"text/event-stream": {}}}
        return app.post(path, dependencies=guarded, openapi_extra={"requestBody": schema}, responses=answers)

    @post("/v1/chat/completions", ChatCompletionRequest)
    async def chat_completions() -> Response:
        """A chat's answer, whole or as server-sent events."""
        return CompletionResponse(service, converter.chat_completion)

    @post("/v1/completions", CompletionRequest)
    async def completions() -> Response:
        """What follows a text, whole or as server-sent events."""
        return CompletionResponse(service, converter.completion)

    @post("/v1/responses", ResponsesRequest)
    async def responses() -> Response:
        """A chat's answer as a response, whole or as server-sent events."""
        return CompletionResponse(service, converter.response)

    @post("/tokenize", TokenizeRequest)
    async def tokenize(request: Request) -> dict[str, Any]:
        """The tokens of a prompt, or of a chat."""
        return await _converted(service, converter.tokenize, request)

    @post("/detokenize", DetokenizeRequest)
    async def detokenize(request: Request) -> dict[str, Any]:
        """The text of tokens."""
        return await _converted(service, converter.detokenize, request)

    @read("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        """The served model and its strategies."""
        return {"object": "list", "data": [service.model_document()]}

    @read("/v1/models/{name:path}", dependencies=guarded)
    async def model(name: str) -> dict[str, Any]:
        """The served model, when it has this name."""
        service.check_model(name)
        return service.model_document()

    @read("/metrics", dependencies=guarded, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """In Prometheus's text format."""
        return Response(service.metrics.render(await service.backend.status()), media_type=CONTENT_TYPE_LATEST)

    @read("/", include_in_schema=False)
    async def page() -> Response:
        """A page to chat with the model. It loads nothing from elsewhere, and asks this server only."""
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": _PAGE_POLICY})

    @read("/health", responses={503: {"description": "Requests are not accepted now."}})
    async def health() -> JSONResponse:
        """200 while requests are accepted, else 503."""
        workers = 0 if service.closing else (await service.backend.status()).workers
        return JSONResponse({"status": "ok" if workers else "unavailable"}, 200 if workers else 503)

    async def answer_ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, SkipkernelsError)
        failure = HttpError.of(error)
        service.metrics.failed(failure.status, failure.code)
        return _answer(failure)

    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(SkipkernelsError, answer_ours)
    app.add_exception_handler(Exception, _answer_bug)
    app.add_middleware(GZipMiddleware, minimum_size=_COMPRESSED_BYTES)
    if service.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.cors_origins),
            allow_methods=["GET", "HEAD", "POST", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=[_REQUEST_ID, "x-skipkernels-ignored"],
        )
    app.add_middleware(_Requests)
    return app


def _inlined(body: type[BaseModel]) -> dict[str, Any]:
    """A schema without references, which would point to nowhere in the document of the routes."""
    schema = body.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolve(definitions[node["$ref"].rsplit("/", 1)[1]])
            return {name: resolve(value) for name, value in node.items()}
        return [resolve(item) for item in node] if isinstance(node, list) else node

    return dict(resolve(schema))


async def _converted(
    service: Service, conversion: Callable[[bytes], dict[str, Any]], request: Request
) -> dict[str, Any]:
    service.check_slot()
    body = await service.bodies.read(request)
    with service.request_slot():
        return await service.convert(conversion, body)


class _Requests:
    """Every request and its answer have an id, the client's where it sends one. A slash at the end of a path means
    nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if len(scope["path"]) > 1:
            scope["path"] = scope["path"].rstrip("/") or "/"
        given = dict(scope["headers"]).get(_REQUEST_ID.encode(), b"")
        own = given if re.fullmatch(rb"[\w.:-]{1,128}", given) else f"req_{uuid.uuid4().hex}".encode()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (_REQUEST_ID.encode(), own)]
            await send(message)

        await self._app(scope, receive, send_named)


def _answer(error: HttpError) -> JSONResponse:
    return JSONResponse(error.document, error.status, error.headers)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"
    if request.method == "OPTIONS" and error.status_code == 405:
        return Response(status_code=204, headers=headers)
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    answer = _answer(HttpError(error.status_code, codes.get(error.status_code, "http_error"), message))
    answer.headers.update(headers)
    return answer


async def _answer_bug(request: Request, error: Exception) -> Response:
    """uvicorn logs the traceback."""
    return _answer(HttpError(500, "internal_error", f"a bug in skipkernels: {type(error).__name__}"))
