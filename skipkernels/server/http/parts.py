"""Decodes images and recordings in requests. Their size is checked in their headers before they are decoded."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings

import numpy as np

from skipkernels.chat.chat import Audio, Image
from skipkernels.server.http.errors import HttpError
from skipkernels.server.http.limits import RequestLimits

_DATA_URI = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# of WAV, FLAC, OGG and MP3; the library decodes many more formats, each of them attack surface
_AUDIO_HEADS = re.compile(rb"RIFF....WAVE|fLaC|OggS|ID3|\xff[\xe0-\xff]", re.DOTALL)
_MOST_CHANNELS = 8
_HIGHEST_RATE_HZ = 192_000
_LOWEST_RATE_HZ = 1_000


class PartDecoder:
    """Decodes the parts of one request, which share the request's limits."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._pixels_left = limits.max_image_pixels
        self._audio_left_s = limits.max_audio_s

    def image(self, url: str, param: str) -> Image:
        """
        Args:
            url: a data URI; nothing is ever fetched.
            param: path of the field in the request, for errors.
        """
        head = _DATA_URI.match(url[:256])
        if head is None or not head["type"].lower().startswith("image/"):
            shown = url[:40] + ("..." if len(url) > 40 else "")
            raise _invalid(
                f"an image must be a data URI like 'data:image/png;base64,...', got {shown!r}; this server fetches "
                "nothing from other hosts",
                param,
            )
        encoded = _decode_base64(url[head.end() :], param)
        from PIL import Image as PillowImage
        from PIL import ImageOps, UnidentifiedImageError

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns at a limit of its own; ours is checked below
                picture = PillowImage.open(io.BytesIO(encoded), formats=_IMAGE_FORMATS)
        except PillowImage.DecompressionBombError as error:
            raise self._too_large(str(error), param) from error
        except UnidentifiedImageError as error:
            raise _invalid(f"the image is none of {', '.join(_IMAGE_FORMATS)}", param) from error
        except Exception as error:  # Pillow's decoders raise all kinds
            raise _undecodable(error, param) from error
        pixels = picture.width * picture.height
        if pixels > self._pixels_left:
            raise self._too_large(f"an image of {picture.width} x {picture.height} pixels", param)
        self._pixels_left -= pixels
        try:
            decoded = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        except Exception as error:
            raise _undecodable(error, param) from error
        return Image(decoded)

    def audio(self, data: str, param: str) -> Audio:
        """
        Args:
            data: base64 of a file; its format is read from the file itself.
            param: path of the field in the request, for errors.
        """
        import soundfile

        encoded = _decode_base64(data, param)
        if not _AUDIO_HEADS.match(encoded):
            raise _invalid("the recording is none of WAV, FLAC, OGG, MP3", param)
        try:
            with soundfile.SoundFile(_AudioFile(encoded)) as sound:
                rate_hz, channels, frames = sound.samplerate, sound.channels, sound.frames
                self._check_audio(rate_hz, channels, frames, param)
                samples = sound.read(frames=frames, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:  # str(error) shows the address of a Python object
            raise _invalid(f"the recording cannot be decoded: {error.error_string}", param) from error
        if not len(samples):
            raise _invalid("the recording holds no samples", param)
        mono = np.nan_to_num(samples.mean(axis=1), posinf=1.0, neginf=-1.0)  # a file of floats may hold anything
        return Audio(np.clip(mono, -1.0, 1.0), rate_hz)

    def _too_large(self, what: str, param: str) -> HttpError:
        return HttpError(
            413,
            "image_too_large",
            f"{what}; the images of a request may have {self._limits.max_image_pixels:,} pixels together, "
            f"{self._pixels_left:,} are left for this one",
            param,
        )

    def _check_audio(self, rate_hz: int, channels: int, frames: int, param: str) -> None:
        if channels > _MOST_CHANNELS or not _LOWEST_RATE_HZ <= rate_hz <= _HIGHEST_RATE_HZ:
            raise _invalid(
                f"a recording must have 1 to {_MOST_CHANNELS} channels at {_LOWEST_RATE_HZ} to {_HIGHEST_RATE_HZ} Hz, "
                f"got {channels} at {rate_hz}",
                param,
            )
        seconds = frames / rate_hz
        if not 0.0 <= seconds <= self._audio_left_s:
            raise HttpError(
                413,
                "audio_too_long",
                f"a recording of {seconds:.1f} s; those of a request may last {self._limits.max_audio_s:g} s together, "
                f"{self._audio_left_s:.1f} are left for this one",
                param,
            )
        self._audio_left_s -= seconds


class _AudioFile(io.BytesIO):
    """Ignores seeks to negative positions, which broken files cause in the decoder."""

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.tell() if whence == io.SEEK_SET and offset < 0 else super().seek(offset, whence)


def _decode_base64(text: str, param: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _invalid(f"not base64: {error}", param) from error


def _undecodable(error: Exception, param: str) -> HttpError:
    return _invalid(f"the image cannot be decoded: {error}", param)


def _invalid(message: str, param: str) -> HttpError:
    return HttpError(400, "invalid_request", message, param)
