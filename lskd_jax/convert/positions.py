"""Position embeddings for another image size: the numbers of PyTorch's bicubic interpolation.

BLIP-2 was trained at 224 px and is used at 364 or 480: the grid of embeddings is then stretched, the
class token's is kept (LAVIS `interpolate_pos_embed`; transformers `interpolate_pos_encoding`).
"""
import math

import numpy as np

A = -0.75  # of Keys' cubic convolution kernel in PyTorch; -0.5, as elsewhere, gives other numbers


def resize_positions(positions: np.ndarray, grid: int) -> np.ndarray:
  """float32[1 + g^2, C] -> float32[1 + grid^2, C], class token first.

  As `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`: no antialiasing, indices
  clamped at the edge.
  """
  size = math.isqrt(len(positions) - 1)
  if size == grid:
    return positions
  weights = bicubic_weights(size, grid)
  cells = positions[1:].reshape(size, size, -1).astype(np.float64)
  stretched = np.einsum("yi,xj,ijc->yxc", weights, weights, cells, optimize=True)
  stretched = stretched.reshape(grid * grid, -1).astype(positions.dtype)
  return np.concatenate([positions[:1], stretched])


def bicubic_weights(size: int, wanted: int) -> np.ndarray:
  """float64[wanted, size]: the share of each old cell in each new one (Keys 1981)."""
  at = (np.arange(wanted) + 0.5) * size / wanted - 0.5
  first = np.floor(at).astype(int)
  weights = np.zeros((wanted, size))
  for tap in range(-1, 3):
    distance = np.abs(at - (first + tap))
    near = (A + 2) * distance**3 - (A + 3) * distance**2 + 1
    far = A * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    cells = np.clip(first + tap, 0, size - 1)
    np.add.at(weights, (np.arange(wanted), cells), np.where(distance <= 1, near, far))
  return weights
