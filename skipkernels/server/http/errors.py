"""Errors in OpenAI's format: an HTTP status, and JSON with the reason and the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from skipkernels.errors import RequestError, SkipkernelsError
from skipkernels.modality.errors import (
    AccuracyUnreachable,
    DeadlineUnreachable,
    JobFailed,
    ServiceClosed,
    WorkerLost,
)

JOB_FAILED = "job_failed"
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
# most specific first
_STATUSES: tuple[tuple[type[SkipkernelsError], int, str], ...] = (
    (AccuracyUnreachable, 400, "accuracy_unreachable"),
    (DeadlineUnreachable, 429, "deadline_unreachable"),
    (RequestError, 400, "invalid_request"),
    (ServiceClosed, 503, "service_closed"),
    (WorkerLost, 503, "worker_lost"),
    (JobFailed, 500, JOB_FAILED),
)


class HttpError(SkipkernelsError):
    """A request that is answered with an error.

    Args:
        param: the field that is wrong, like ``messages.0.content``.
        headers: of the answer.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def document(self) -> dict[str, Any]:
        """The JSON body."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @classmethod
    def of(cls, error: SkipkernelsError) -> HttpError:
        """What to answer when the package raised ``error``."""
        if isinstance(error, HttpError):
            return error
        for kind, status, code in _STATUSES:
            if isinstance(error, kind):
                return cls(status, code, str(error), getattr(error, "param", None))
        return cls(500, "internal_error", str(error))

    @classmethod
    def of_validation(cls, error: ValidationError) -> HttpError:
        """The first error in a body. The value sent is not repeated, because it may be large."""
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        steps = [str(step) for step in first["loc"]]
        param = ".".join(step for step in steps if not step.startswith("("))  # tags of unions are no fields
        message = str(first["msg"])
        return cls(400, "invalid_request", f"{param}: {message}" if param else message, param or None)
