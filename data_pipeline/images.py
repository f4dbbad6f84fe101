"""Image files to pixels. A damaged, missing or absurdly large file is an error that names it.

Pixels stay in the frame of the stored file, since boxes are given in it: an EXIF orientation is not
applied unless asked for (`upright`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
import simplejpeg

from data_pipeline.records import DataError, ImageRecord

# 240 MB as uint8 RGB: above any photograph in the corpora we know, below a decompression bomb.
MAX_PIXELS = 80_000_000


def read_image(
  path: Path | str, max_pixels: int = MAX_PIXELS, upright: bool = False
) -> Image.Image:
  """The RGB image in a file; transparency becomes white, an animation its first frame.

  upright: turn a photograph as its EXIF orientation says, for regions marked in a viewer.
  DataError for a missing, damaged or non-image file, and, from the header alone, before any pixel
  is decoded, for more than max_pixels.
  """
  with _image_errors(path), Image.open(path) as image:
    _check_size(*image.size, max_pixels, path)
    image.load()
    return to_rgb(ImageOps.exif_transpose(image) if upright else image)


def decode(data: bytes, max_pixels: int = MAX_PIXELS, name: str = "image") -> np.ndarray:
  """uint8[H, W, 3] of an encoded image. Errors as in `read_image`; `name` is what they call it."""
  if data[:2] == b"\xff\xd8":
    try:
      height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
      raise DataError(f"{name}: damaged JPEG ({error}); {_ADVICE}") from None
    _check_size(width, height, max_pixels, name)
    if colorspace != "CMYK":  # four-channel JPEGs go to PIL, which knows Adobe's inverted ones
      try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
      except ValueError as error:
        raise DataError(f"{name}: damaged JPEG ({error}); {_ADVICE}") from None
  with _image_errors(name), Image.open(io.BytesIO(data)) as image:
    _check_size(*image.size, max_pixels, name)
    image.load()
    return np.asarray(to_rgb(image))


def resize(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
  """uint8[H, W, 3] -> uint8[height, width, 3], bicubic; the aspect ratio is not kept.

  size: the side of a square, or (height, width).
  """
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise TypeError(f"want uint8[H, W, 3], got {image.dtype}{list(image.shape)}")
  height, width = (size, size) if isinstance(size, int) else size
  if image.shape[:2] == (height, width):
    return image
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def image_size(path: Path | str) -> tuple[int, int]:
  """(width, height) of an image file, decoded as training does: half of one has no size. Errors as
  in `read_image`."""
  with _image_errors(path):
    data = Path(path).read_bytes()
  height, width = decode(data, name=str(path)).shape[:2]
  return width, height


def with_size(record: ImageRecord, image_root: Path | str) -> ImageRecord:
  """The record with its width and height read from the file, where it does not know them yet."""
  if record.width and record.height:
    return record
  width, height = image_size(Path(image_root) / record.image)
  return dataclasses.replace(record, width=width, height=height)


_ADVICE = "fetch the file again, or remove it from the records"


@contextlib.contextmanager
def _image_errors(name: Path | str):
  """Turns what PIL raises into a DataError that names the file."""
  try:
    yield
  except DataError:
    raise
  except FileNotFoundError:
    raise DataError(f"{name}: no such image; check the image root and the file name") from None
  except (UnidentifiedImageError, IsADirectoryError):
    raise DataError(f"{name}: not an image; give a JPEG, PNG or what else PIL reads") from None
  except Image.DecompressionBombError as error:
    raise DataError(f"{name}: too large ({error}); shrink it first") from None
  except Exception as error:  # PIL's decoders raise a dozen types for damaged data
    raise DataError(f"{name}: damaged or unreadable ({error}); {_ADVICE}") from error


def _check_size(width: int, height: int, max_pixels: int, name: Path | str) -> None:
  if width * height > max_pixels:
    limit = f"{width}x{height} is more than {max_pixels} pixels"
    raise DataError(f"{name}: {limit}; shrink it first, or raise max_pixels")


def to_rgb(image: Image.Image) -> Image.Image:
  """A picture of any mode in RGB: transparent parts white, 16-bit grey by its upper bits."""
  if image.mode.startswith("I"):  # 16-bit grey: `convert` would clip it to white
    levels = np.asarray(image)
    levels = levels >> 8 if levels.max(initial=0) > 255 else levels
    image = Image.fromarray(levels.astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return image.convert("RGB")
