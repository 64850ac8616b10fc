"""What the routes call: admission, conversion of requests, and the backend that answers them."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from skipkernels.chat.chat import ChatFormat
from skipkernels.errors import SkipkernelsError
from skipkernels.modality.errors import ServiceClosed
from skipkernels.modality.profile import Profile
from skipkernels.server.http.backend import Backend
from skipkernels.server.http.body import BodyReader
from skipkernels.server.http.conversion import Converter, ParsedRequest, check_model
from skipkernels.server.http.dialect import Naming
from skipkernels.server.http.documents import model_document
from skipkernels.server.http.errors import JOB_FAILED, HttpError
from skipkernels.server.http.limits import RequestLimits
from skipkernels.server.http.metrics import Metrics
from skipkernels.server.http.pending_request import PendingRequest

T = TypeVar("T")
_CONVERSIONS = 4


class Service:
    """``async with`` starts and closes the backend.

    Args:
        profile: of the served model; its ``model`` is the name that clients ask for.
        chat_format: of that model.
        api_key: the bearer token that clients have to send; None: none.
        strict: whether fields that are not known are refused; else they are ignored and named in a header.
        cors_origins: web pages of which origins may use this server; ``*``: all.
    """

    def __init__(
        self,
        profile: Profile,
        chat_format: ChatFormat,
        backend: Backend,
        *,
        limits: RequestLimits | None = None,
        api_key: str | None = None,
        strict: bool = False,
        cors_origins: Sequence[str] = (),
    ) -> None:
        self.backend = backend
        self.limits = limits or RequestLimits()
        self.bodies = BodyReader(self.limits, chat_format.modalities)
        self.metrics = Metrics()
        self.profile = profile
        self.cors_origins = tuple(cors_origins)
        self._format = chat_format
        naming = Naming(profile.model, profile.fingerprint)
        self.converter = Converter(naming, chat_format, self.limits, strict)
        self._api_key = None if api_key is None else api_key.encode()
        self._created = int(time.time())
        # a few: a long text holds only one of them up
        self._threads = ThreadPoolExecutor(_CONVERSIONS, thread_name_prefix="skipkernels-requests")
        self._requests = 0
        self._pending: set[PendingRequest] = set()
        self._closing: asyncio.Task[None] | None = None
        self._grace_ended = asyncio.Event()

    async def __aenter__(self) -> Service:
        await self.backend.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(0.0)
        self._threads.shutdown()

    def adopt(self, profile: Profile) -> None:
        """More is known of the same model; called in the event loop."""
        self.profile = profile
        self.backend.adopt(profile)

    @property
    def requests(self) -> int:
        """How many are being answered."""
        return self._requests

    @property
    def busy(self) -> bool:
        """Whether a request is being answered; safe to ask from any thread."""
        return self._requests > 0

    @property
    def closing(self) -> bool:
        return self._closing is not None

    async def close(self, grace_s: float) -> None:
        """Accepts no more requests. Accepted ones are answered, or fail after ``grace_s``. Later calls wait for the
        first."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(grace_s))
        await asyncio.shield(self._closing)

    async def _close(self, grace_s: float) -> None:
        closing = asyncio.create_task(self.backend.close(grace_s))
        ended = asyncio.create_task(self._grace_ended.wait())
        await asyncio.wait([closing, ended], timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        for pending in self._pending:
            pending.cut_short()  # running batches are waited for, so end them early
        if ended.done():
            await self.backend.close(0.0)
        ended.cancel()
        await closing

    def end_grace(self) -> None:
        """Ends the grace period of a ``close`` that has begun."""
        self._grace_ended.set()

    def check_key(self, authorization: str | None) -> None:
        """
        Args:
            authorization: the Authorization header.

        Raises:
            HttpError: it does not contain the key.
        """
        if self._api_key is None:
            return
        scheme, _, key = (authorization or "").partition(" ")
        sent = key.strip().encode("latin-1")  # the bytes on the wire
        if scheme.lower() != "bearer" or not hmac.compare_digest(sent, self._api_key):
            raise HttpError(401, "invalid_api_key", "send this server's key as 'Authorization: Bearer <key>'")

    def check_slot(self) -> None:
        """Whether a request could be answered now, for one whose body is still to be read: reading it takes no slot.

        Raises:
            HttpError: all slots are taken.
            ServiceClosed: the shutdown has begun.
        """
        if self.closing:
            raise ServiceClosed("the service is shutting down")
        if self._requests >= self.limits.max_requests:
            raise HttpError(
                429, "too_many_requests", f"{self._requests} requests are being answered, the maximum; try again later"
            )

    @contextmanager
    def request_slot(self) -> Iterator[None]:
        """Takes one of the ``max_requests`` slots while the block runs.

        Raises:
            HttpError, ServiceClosed: see ``check_slot``.
        """
        self.check_slot()
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def convert(self, conversion: Callable[[bytes], T], body: bytes) -> T:
        """Checks and decodes a body with a method of ``converter``, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, conversion, body)

    def submit(self, parsed: ParsedRequest) -> PendingRequest:
        """Hands a request to the backend."""
        pending = PendingRequest(self.backend, parsed.job, self._pending.discard, streamed=parsed.stream)
        self._pending.add(pending)
        return pending

    def error(self, error: SkipkernelsError) -> HttpError:
        """What to answer a request that failed."""
        answer = HttpError.of(error)
        if self.closing and answer.code == JOB_FAILED:
            return HttpError.of(ServiceClosed(str(error)))  # 503, so that the client may try another server
        return answer

    def check_model(self, name: str) -> None:
        """Raises HttpError when a model of this name is not served."""
        check_model(name, self.profile.model)

    def model_document(self) -> dict[str, Any]:
        return model_document(self.profile, self._format, self._created)
