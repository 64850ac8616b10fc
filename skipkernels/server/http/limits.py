"""What a client may ask a server to hold."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class RequestLimits:
    """All are checked before the memory they protect is taken.

    Args:
        max_body_bytes: of a request, as sent.
        max_parts: of all messages of a request together; a message of plain text is one.
        max_image_pixels: of all images of a request together, decoded: three bytes each.
        max_audio_s: of all recordings of a request together.
        max_requests: that are read, wait or run at one time.
        client_timeout_s: for a client to send a whole body, and to take one piece of an answer.
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
