"""Limits on what one client, and all clients together, may send to a server."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class RequestLimits:
    """Every limit is checked before the memory that it protects is allocated.

    Args:
        max_body_bytes: size of a request body.
        max_parts: parts in all messages of a request; a message of plain text is one part.
        max_image_pixels: decoded pixels in all images of a request, three bytes each.
        max_audio_s: duration of all recordings of a request.
        max_requests: concurrent requests: being read, waiting or running.
        client_timeout_s: for sending a whole body, and for reading one piece of an answer.
    """

    max_body_bytes: int = 16 << 20
    max_parts: int = 64
    max_image_pixels: int = 1 << 24
    max_audio_s: float = 120.0
    max_requests: int = 256
    client_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:  # NaN fails too
                raise ValueError(f"{field.name} must be positive, got {getattr(self, field.name)}")
