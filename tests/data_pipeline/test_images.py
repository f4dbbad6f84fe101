"""Image files: what decodes, and that a bad file is named and refused, never greyed in."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
import pytest

from data_pipeline import images
from data_pipeline.records import DataError, ImageRecord


def picture(mode="RGB", size=(32, 24)):
  """A smooth gradient, which JPEG keeps within a few levels."""
  columns, rows = np.meshgrid(np.linspace(0, 200, size[0]), np.linspace(0, 200, size[1]))
  rgb = np.stack([columns, rows, columns / 2 + rows / 2], axis=-1).astype(np.uint8)
  return Image.fromarray(rgb).convert(mode)


def encoded(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def huge_png(width=40_000, height=40_000):
  """A few hundred bytes that claim to be 1.6 billion pixels."""

  def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  body = zlib.compress(b"\0" * 100)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_read_and_decode_agree_with_the_pixels(tmp_path, kind):
  data = encoded(picture(), kind)
  path = tmp_path / "a.img"
  path.write_bytes(data)
  tolerance = 0 if kind in ("PNG", "BMP") else 20  # the others are lossy
  for pixels in (images.decode(data), np.asarray(images.read_image(path))):
    assert pixels.dtype == np.uint8 and pixels.shape == (24, 32, 3)
    assert np.abs(pixels.astype(int) - np.asarray(picture())).max() <= tolerance


@pytest.mark.parametrize(
  "mode, kind", [("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("P", "PNG")]
)
def test_other_colour_modes_become_rgb(mode, kind):
  image = picture(mode)
  pixels = images.decode(encoded(image, kind))
  expected = np.asarray(image.convert("RGB")).astype(int)
  assert np.abs(pixels - expected).max() <= 12


def test_transparency_becomes_white_and_16_bit_grey_is_scaled():
  clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
  assert (images.decode(encoded(clear, "PNG")) == 255).all()
  deep = Image.fromarray(np.full((4, 4), 0x80FF, np.uint16))
  assert (images.decode(encoded(deep, "PNG")) == 0x80).all()


def test_pixels_keep_the_frame_of_the_file_unless_asked_upright(tmp_path):
  path = tmp_path / "phone.jpg"
  exif = Image.Exif()
  exif[0x0112] = 6  # "rotate by 90 degrees to view"
  path.write_bytes(encoded(picture(), "JPEG", exif=exif))
  assert images.read_image(path).size == images.image_size(path) == (32, 24)
  assert images.decode(path.read_bytes()).shape == (24, 32, 3)
  assert images.read_image(path, upright=True).size == (24, 32)


@pytest.mark.parametrize(
  "content, fault",
  [
    (None, "no such image"),
    (b"", "not an image"),
    (b"<html>404 not found</html>", "not an image"),
    (encoded(picture(size=(200, 200)), "JPEG")[:2000], "damaged"),
    (encoded(picture(size=(200, 200)), "PNG")[:600], "damaged"),
    (huge_png(), "too large|more than"),
    (huge_png(9_000, 9_000), "9000x9000 is more than 80000000 pixels"),
  ],
)
def test_bad_files_are_named(tmp_path, content, fault):
  path = tmp_path / "bad.jpg"
  if content is not None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"bad.jpg: .*({fault})"):
      images.decode(content, name="bad.jpg")
  with pytest.raises(DataError, match=f"bad.jpg: .*({fault}).*;"):
    images.read_image(path)
  with pytest.raises(DataError, match=f"bad.jpg: .*({fault}).*;"):
    images.image_size(path)


def test_a_folder_is_not_an_image(tmp_path):
  with pytest.raises(DataError, match="not an image"):
    images.read_image(tmp_path)


def test_the_limit_on_pixels_can_be_set():
  data = encoded(picture(), "JPEG")
  with pytest.raises(DataError, match="32x24 is more than 700 pixels"):
    images.decode(data, max_pixels=700)


def test_resize_is_square_and_bicubic():
  flat = np.full((10, 30, 3), 77, np.uint8)
  assert (images.resize(flat, 16) == 77).all() and images.resize(flat, 16).shape == (16, 16, 3)
  step = np.repeat(np.array([0, 200], np.uint8), 8)[None, :, None].repeat(16, 0).repeat(3, 2)
  wide = images.resize(step, 64)[32, :, 0]
  assert wide.max() > 200  # bicubic overshoots at an edge, bilinear does not
  with pytest.raises(TypeError, match="uint8"):
    images.resize(flat.astype(np.float32), 16)


def test_with_size_fills_in_what_a_record_lacks(tmp_path):
  picture().save(tmp_path / "a.png")
  record = ImageRecord("a.png", 0, 0, 0, ())
  sized = images.with_size(record, tmp_path)
  assert (sized.width, sized.height) == (32, 24)
  assert images.with_size(sized, tmp_path / "nowhere") is sized
