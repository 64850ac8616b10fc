"""Pictures and recordings as clients send them."""

import base64
import io
from typing import Any

import numpy as np
import soundfile
from PIL import Image


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def image_file(width: int = 4, height: int = 3, kind: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), 128 if mode == "L" else (255, 0, 0)).save(file, kind)
    return file.getvalue()


def wav_file(seconds: float = 0.5, rate_hz: int = 8000, channels: int = 1, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    samples = np.full((int(seconds * rate_hz), channels), 0.25, np.float32)
    soundfile.write(file, samples, rate_hz, subtype=subtype, format="WAV")
    return file.getvalue()


def image_part(data: bytes | None = None) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64_of(image_file() if data is None else data)}"
    return {"type": "image_url", "image_url": {"url": url}}


def audio_part(data: bytes | None = None) -> dict[str, Any]:
    encoded = base64_of(wav_file() if data is None else data)
    return {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}


def text_part(text: str = "one two three") -> dict[str, Any]:
    return {"type": "text", "text": text}
