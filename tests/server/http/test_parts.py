"""Images and recordings: what they become, and what is refused before memory is taken for it."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from skipkernels.server.http.errors import HttpError
from skipkernels.server.http.limits import RequestLimits
from skipkernels.server.http.parts import PartDecoder
from tests.server.http.media import base64_of, image_file, wav_file

SMALL = RequestLimits(max_image_pixels=100, max_audio_s=1.0)


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64_of(data)}"


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and ends where its pixels should be."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + struct.pack(">I", 99) + b"IDAT"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_become_rgb(kind: str, mode: str) -> None:
    pixels = PartDecoder(SMALL).image(uri(image_file(5, 7, kind, mode)), "x").pixels
    assert (pixels.shape, pixels.dtype) == ((7, 5, 3), np.uint8)
    wanted = (255, 0, 0) if mode == "RGB" else (128, 128, 128)
    np.testing.assert_allclose(pixels[3, 2], wanted, atol=8)  # JPEG and WEBP do not keep colours exactly


def test_a_photograph_is_turned_upright() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by a quarter
    Image.new("RGB", (5, 7)).save(file, "JPEG", exif=exif)
    assert PartDecoder(SMALL).image(uri(file.getvalue(), "image/jpeg"), "x").pixels.shape == (5, 7, 3)


@pytest.mark.parametrize(("width", "height"), [(11, 10), (10_000, 8_000), (60_000, 60_000)])
def test_an_image_too_large_is_refused_by_its_header(width: int, height: int) -> None:
    """The file has nothing but a header: were more read, it could not be decoded."""
    with pytest.raises(HttpError, match="may have 100 pixels together") as refused:
        PartDecoder(SMALL).image(uri(png_of_size(width, height)), "x")
    assert (refused.value.status, refused.value.code) == (413, "image_too_large")
    with pytest.raises(HttpError, match="cannot be decoded"):
        PartDecoder(SMALL).image(uri(png_of_size(10, 10)), "x")


def test_images_share_their_limit() -> None:
    decoder = PartDecoder(SMALL)
    decoder.image(uri(image_file(8, 8)), "x")
    with pytest.raises(HttpError, match="36 are left for this one") as refused:
        decoder.image(uri(image_file(8, 5)), "x")
    assert (refused.value.status, refused.value.code) == (413, "image_too_large")
    decoder.image(uri(image_file(6, 6)), "x")


@pytest.mark.parametrize(
    "url", ["", "data:", "data:image/png,abc", "http://localhost/x.png", "ftp://x", "//x/y.png", "data:;base64,AAAA"]
)
def test_only_images_in_the_request_itself_are_taken(url: str) -> None:
    with pytest.raises(HttpError, match="this server fetches nothing"):
        PartDecoder(SMALL).image(url, "x")


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT"])
@pytest.mark.parametrize("channels", [1, 2])
def test_recordings_become_mono(subtype: str, channels: int) -> None:
    audio = PartDecoder(SMALL).audio(base64_of(wav_file(0.5, 8000, channels, subtype)), "x")
    assert (audio.samples.shape, audio.samples.dtype, audio.rate_hz) == ((4000,), np.float32, 8000)
    np.testing.assert_allclose(audio.samples, 0.25, atol=1 / 128)  # eight bits are the coarsest


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_recording_too_long_is_refused_before_it_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(3 * 8000), 8000, format=kind)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(HttpError, match=r"a recording of 3\.\d s; .* may last 1 s") as refused:
        PartDecoder(SMALL).audio(base64_of(file.getvalue()), "x")
    assert (refused.value.status, refused.value.code) == (413, "audio_too_long")


def test_recordings_share_their_limit() -> None:
    decoder = PartDecoder(SMALL)
    decoder.audio(base64_of(wav_file(0.75)), "x")
    with pytest.raises(HttpError, match=r"0\.2 are left for this one"):
        decoder.audio(base64_of(wav_file(0.5)), "x")


@pytest.mark.parametrize(("rate_hz", "channels"), [(500, 1), (200_000, 1), (8000, 9)])
def test_strange_recordings_are_refused(rate_hz: int, channels: int) -> None:
    with pytest.raises(HttpError, match=f"got {channels} at {rate_hz}"):
        PartDecoder(SMALL).audio(base64_of(wav_file(0.1, rate_hz, channels)), "x")


def test_samples_are_numbers_in_range() -> None:
    file = io.BytesIO()
    samples = np.array([np.nan, np.inf, -np.inf, 3.0, -2.0, 0.5], np.float32)
    soundfile.write(file, samples, 8000, subtype="FLOAT", format="WAV")
    audio = PartDecoder(SMALL).audio(base64_of(file.getvalue()), "x")
    np.testing.assert_array_equal(audio.samples, np.array([0, 1, -1, 1, -1, 0.5], np.float32))


def test_a_recording_of_nothing_is_refused() -> None:
    with pytest.raises(HttpError, match="no samples"):
        PartDecoder(SMALL).audio(base64_of(wav_file(0.0)), "x")


@pytest.mark.parametrize("kind", ["AIFF", "CAF", "W64"])
def test_other_formats_are_not_even_opened(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(100), 8000, format=kind)
    monkeypatch.setattr(soundfile, "SoundFile", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(HttpError, match="none of WAV, FLAC, OGG, MP3"):
        PartDecoder(SMALL).audio(base64_of(file.getvalue()), "x")


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "WAV"]), st.data())
def test_a_broken_file_is_decoded_or_refused(kind: str, data: st.DataObject) -> None:
    """Bytes changed and cut off anywhere: nothing but an ``HttpError`` comes out."""
    whole = bytearray(wav_file(0.01) if kind == "WAV" else image_file(6, 6, kind))
    for _ in range(data.draw(st.integers(0, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    decoder = PartDecoder(SMALL)
    with contextlib.suppress(HttpError):
        if kind == "WAV":
            assert np.isfinite(decoder.audio(base64_of(broken), "x").samples).all()
        else:
            assert decoder.image(uri(broken), "x").pixels.size <= 300
