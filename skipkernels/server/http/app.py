"""The routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Header, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request

from skipkernels import __version__
from skipkernels.errors import SkipkernelsError
from skipkernels.server.http.completion_response import CompletionResponse
from skipkernels.server.http.errors import HttpError
from skipkernels.server.http.schema import ChatCompletionRequest
from skipkernels.server.http.service import Service

_BODY = {"content": {"application/json": {"schema": ChatCompletionRequest.model_json_schema()}}, "required": True}


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
    guarded = [Depends(check_key)]

    @app.post("/v1/chat/completions", dependencies=guarded, openapi_extra={"requestBody": _BODY})
    async def chat_completions() -> Response:
        """A chat's answer, whole or as server-sent events."""
        return CompletionResponse(service)

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        """The served model and its strategies."""
        return {"object": "list", "data": [service.model_document()]}

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def model(name: str) -> dict[str, Any]:
        """The served model, when it has this name."""
        service.check_model(name)
        return service.model_document()

    @app.get("/metrics", dependencies=guarded)
    async def metrics() -> Response:
        """In Prometheus's text format."""
        return Response(service.metrics.render(await service.backend.status()), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while requests are accepted, else 503."""
        workers = 0 if service.closing else (await service.backend.status()).workers
        return JSONResponse({"status": "ok" if workers else "unavailable"}, 200 if workers else 503)

    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(SkipkernelsError, _answer_ours)
    app.add_exception_handler(Exception, _answer_bug)
    return app


def _answer(error: HttpError) -> JSONResponse:
    return JSONResponse(error.document, error.status)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    return _answer(HttpError(error.status_code, codes.get(error.status_code, "http_error"), message))


async def _answer_ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, SkipkernelsError)
    return _answer(HttpError.of(error))


async def _answer_bug(request: Request, error: Exception) -> Response:
    """uvicorn logs the traceback."""
    return _answer(HttpError(500, "internal_error", f"a bug in skipkernels: {type(error).__name__}"))
