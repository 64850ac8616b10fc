"""Limits on what one client, and all clients together, may send to a server."""

from __future__ import annotations

from dataclasses import dataclass, fields

_HALF_SENT_PER_REQUEST = 4
_HALF_SENT_BODIES = 32  # of the largest size


@dataclass(frozen=True)
class RequestLimits:
    """Every limit is checked before the memory that it protects is allocated.

    Args:
        max_body_bytes: size of a request body.
        max_parts: parts in all messages of a request; a message of plain text is one part.
        max_image_pixels: decoded pixels in all images of a request, three bytes each.
        max_audio_s: duration of all recordings of a request.
        max_requests: concurrent requests whose bodies are complete: waiting or running.
        client_timeout_s: for sending a whole body, and for taking a piece of an answer.
    """

    max_body_bytes: int = 16 << 20
    max_parts: int = 64
    max_image_pixels: int = 1 << 24
    max_audio_s: float = 120.0
    max_requests: int = 256
    client_timeout_s: float = 60.0

    @property
    def max_half_sent(self) -> int:
        """How many bodies are read at a time."""
        return _HALF_SENT_PER_REQUEST * self.max_requests

    @property
    def max_half_sent_bytes(self) -> int:
        """How many bytes bodies that are being read hold together."""
        return _HALF_SENT_BODIES * self.max_body_bytes

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:  # NaN fails too
                raise ValueError(f"{field.name} must be positive, got {getattr(self, field.name)}")
