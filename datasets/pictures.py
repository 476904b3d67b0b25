"""One picture file to 8-bit RGB, whatever mode Pillow opens it in.

Pillow's own convert("RGB") cuts off at 255 what has more than 8 bits, so that dark and bright pictures alike become
white. Here such pictures are scaled by the range that they use:

    I;16, I;16B ...           0..65535      16-bit grey, as PNG, TIFF and PGM hold it
    I  (32-bit integers)      0..65535 from a PNG or PGM; else the smallest of 255, 65535, 2^31 - 1 that holds it
    F  (floats)               the smallest of 1, 255, 65535 that holds it
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageCms

from pipeline.errors import UserError

_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # Pillow converts these to nothing else
_RANGES = {"I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535)}
_NETPBM = ("PNG", "PPM")  # formats whose mode I means 16 bits
MEGAPIXEL = 1e6


def read_rgb(path: Path) -> Pillow.Image:
    """The picture in `path` as RGB.

    Raises:
        UserError: no picture, a damaged one, a larger one than Pillow opens, or a file that cannot be read.
    """
    try:
        with Pillow.open(path) as image:
            return to_rgb(image)
    except Pillow.DecompressionBombError as error:
        most = 2 * (Pillow.MAX_IMAGE_PIXELS or 0) / MEGAPIXEL
        raise UserError(f"{path}: has more than {most:.0f} million pixels; make it smaller, or delete it") from error
    except (OSError, SyntaxError, ValueError, Pillow.UnidentifiedImageError) as error:
        raise UserError(f"{path}: {_reason(error)}") from error


def size_of(path: Path) -> tuple[int, int] | None:
    """(width, height) as the file's header says, or None where it says nothing: who reads it will say why."""
    try:
        with Pillow.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError):
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:  # the file system's, not Pillow's
        return f"cannot be read ({os.strerror(error.errno)})"
    reason = str(error).split("\n")[0]
    return f"not a readable image ({reason}); replace it or delete it"


def to_rgb(image: Pillow.Image) -> Pillow.Image:
    """The same picture in 8-bit RGB; transparency is left out."""
    if image.mode.startswith("I;16"):
        return _grey(image, 65535)
    if image.mode in _RANGES:
        return _grey(image, _range(image))
    if image.mode == "LAB":
        return _from_lab(image)
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    return image.convert("RGB")


def _range(image: Pillow.Image) -> int:
    if image.mode == "I" and image.format in _NETPBM:
        return 65535
    ranges = _RANGES[image.mode]
    largest = float(_pixels(image).max(initial=0))
    return next((end for end in ranges if largest <= end), ranges[-1])


def _grey(image: Pillow.Image, white: int) -> Pillow.Image:
    scaled = np.clip(_pixels(image) * (255 / white), 0, 255)
    return Pillow.fromarray(scaled.round().astype(np.uint8)).convert("RGB")


def _pixels(image: Pillow.Image) -> NDArray[np.float64]:
    """(height, width)"""
    pixels = np.asarray(image, dtype=np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("it has pixels that are not finite")
    return pixels


def _from_lab(image: Pillow.Image) -> Pillow.Image:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    assert converted is not None  # it is None only where a picture is changed in place
    return converted
