"""Position embeddings at another image size: PyTorch's bicubic interpolation, number by number."""
import numpy as np
import pytest
import torch

from lskd_jax.convert.positions import bicubic_weights, resize_positions


@pytest.mark.parametrize("size,wanted", [
    (16, (26, 26)), (16, (34, 34)), (4, (3, 3)), (5, (11, 11)), (1, (4, 4)), (7, (7, 7)), (9, (2, 2)),
    (16, (16, 32)), (16, (8, 32)), (4, (2, 8)), (5, (7, 3)), (1, (1, 3)),
])
def test_as_pytorch(size, wanted):
  """224 px to 364 and 480 px with 14 px a patch are 16 to 26 and 16 to 34; smaller works too, and grids
  that are no squares, also where they have as many cells.

  PyTorch in float64: in float32 its own rounding of the coordinates is 4e-6 at 26 cells.
  """
  positions = np.random.default_rng(size).normal(size=(1 + size**2, 6)).astype(np.float32)
  found = resize_positions(positions, (size, size), wanted)
  cells = torch.tensor(positions[1:], dtype=torch.float64).reshape(1, size, size, 6).permute(0, 3, 1, 2)
  want = torch.nn.functional.interpolate(cells, wanted, mode="bicubic", align_corners=False)
  want = want.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
  np.testing.assert_allclose(found[1:], want, atol=3e-7)
  assert (found[0] == positions[0]).all() and found.dtype == np.float32


def test_the_shares_of_a_new_cell_add_up_to_one():
  np.testing.assert_allclose(bicubic_weights(16, 34).sum(1), 1, atol=1e-12)
