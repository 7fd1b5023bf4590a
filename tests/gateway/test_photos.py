"""Pictures: what comes through is what is seen, and nothing else."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image

from gateway.photos import PIXELS_MAX, SIDE_MAX, PhotoRefused, remake

GPS_IFD, LATITUDE, ORIENTATION, MAKE = 0x8825, 2, 0x0112, 0x010F


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int = 400, height: int = 300, mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image.convert(mode)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_place_name_and_comment_of_a_picture_are_dropped(kind: str) -> None:
    exif = Image.Exif()
    exif[MAKE] = "SecretCamera"
    exif.get_ifd(GPS_IFD)[LATITUDE] = (30.0, 16.0, 27.0)
    body = encoded(
        picture(), kind, exif=exif, icc_profile=b"SecretProfile" * 20, xmp=b"<SecretXmp/>", comment="SecretComment"
    )
    assert b"SecretCamera" in body
    photo = remake(body)
    assert b"Secret" not in photo.jpeg
    again = Image.open(io.BytesIO(photo.jpeg))
    assert again.format == "JPEG"
    assert dict(again.getexif()) == {}
    assert set(again.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert (photo.width, photo.height) == again.size == (400, 300)


def test_picture_stands_upright_without_its_orientation_tag() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by 90 degrees clockwise
    photo = remake(encoded(picture(400, 200), "JPEG", exif=exif))
    assert (photo.width, photo.height) == (200, 400)
    red, _, blue = Image.open(io.BytesIO(photo.jpeg)).convert("RGB").getpixel((100, 50))  # type: ignore[misc]
    assert red > 200 and blue < 60  # what was left is now above


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1", "I;16"])
def test_picture_of_any_mode_becomes_rgb(mode: str) -> None:
    image = picture().convert("L").convert("I;16") if mode == "I;16" else picture(mode=mode)
    photo = remake(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert Image.open(io.BytesIO(photo.jpeg)).mode == "RGB"


def test_what_can_be_seen_through_is_white() -> None:
    photo = remake(encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), "PNG"))
    assert min(Image.open(io.BytesIO(photo.jpeg)).getpixel((32, 32))) > 250  # type: ignore[arg-type]


def test_large_picture_is_made_smaller() -> None:
    photo = remake(encoded(picture(4000, 3000), "JPEG"))
    assert (photo.width, photo.height) == (SIDE_MAX, SIDE_MAX * 3 // 4)
    assert len(photo.jpeg) < 200_000


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(6001, 6000), (30_000, 30_000), (2_000_000_000, 2)])
def test_picture_that_would_unpack_to_gigabytes_is_refused_by_its_header(width: int, height: int) -> None:
    assert width * height > PIXELS_MAX
    with pytest.raises(PhotoRefused, match=r"at most 36,000,000 pixels|cannot be read"):
        remake(bomb(width, height))


def test_what_is_no_picture_of_the_kinds_that_are_taken_is_refused() -> None:
    good = encoded(picture(), "JPEG")
    for body in (
        b"",
        b"x" * 100,
        good[: len(good) // 2],
        encoded(picture(), "GIF"),
        encoded(picture(), "TIFF"),
        b"%!PS-Adobe",
    ):
        with pytest.raises(PhotoRefused, match="the picture cannot be read"):
            remake(body)
    with pytest.raises(PhotoRefused, match="at least 16 pixels a side, got 8 x 8"):
        remake(encoded(picture(8, 8), "PNG"))


def test_error_of_a_damaged_picture_says_nothing_of_what_is_in_it() -> None:
    damaged = bytearray(encoded(picture(), "PNG"))
    damaged[60:80] = b"SecretSecretSecretSe"
    with pytest.raises(PhotoRefused) as caught:
        remake(bytes(damaged))
    assert "Secret" not in str(caught.value)
