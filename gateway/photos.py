"""The picture of a child: checked, made smaller and written anew, so that nothing comes through but what is seen.

What cameras and editors write beside the pixels (places, times, names, thumbnails of what was cut off) is not copied.
Sizes are known before anything is unpacked: a file that would unpack to gigabytes is refused by its header.
"""

from __future__ import annotations

import hashlib
import io
import threading
from dataclasses import dataclass

from PIL import Image, ImageOps

FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
"""What is taken, by its media type."""
JPEG_TYPE = "image/jpeg"
"""What is served."""
PIXELS_MAX = 36_000_000
"""Of what comes: some 110 MB unpacked. Phones make 12 and, when asked, 48 million; those have to be made smaller."""
SIDE_MIN, SIDE_MAX = 16, 1_600
"""Sides of what is served are at most the latter."""
QUALITY = 85

_unpacking = threading.Semaphore(2)
"""At once in one process: memory is bounded however many come."""


class PhotoRefused(ValueError):
    """It is no picture that is taken. The message says why."""


@dataclass(frozen=True, slots=True)
class Photo:
    """A JPEG of our own making."""

    jpeg: bytes
    width: int
    height: int
    digest: str
    """SHA-256 of `jpeg`, hex."""


def remake(body: bytes) -> Photo:
    """A picture as it is served: upright, RGB, at most SIDE_MAX a side. Raises PhotoRefused."""
    with _unpacking:
        try:
            image = _opened(body)
        except PhotoRefused:
            raise
        except Exception as error:  # of many classes: whatever a decoder stumbles over in a damaged file
            raise PhotoRefused(f"the picture cannot be read: {type(error).__name__}") from None
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY, optimize=True)
    jpeg = file.getvalue()
    return Photo(jpeg, image.width, image.height, hashlib.sha256(jpeg).hexdigest())


def _opened(body: bytes) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(body), formats=tuple(FORMATS.values()))
    width, height = image.size
    if width * height > PIXELS_MAX:
        raise PhotoRefused(f"the picture must have at most {PIXELS_MAX:,} pixels, got {width} x {height}")
    if min(width, height) < SIDE_MIN:
        raise PhotoRefused(f"the picture must have at least {SIDE_MIN} pixels a side, got {width} x {height}")
    image.draft("RGB", (SIDE_MAX, SIDE_MAX))  # JPEG: unpacked smaller at once where that is enough
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    image = image.convert("RGB")
    image.thumbnail((SIDE_MAX, SIDE_MAX), Image.Resampling.LANCZOS)
    bare = Image.new("RGB", image.size)
    bare.paste(image)  # pixels alone, without what hangs on the other object
    return bare
