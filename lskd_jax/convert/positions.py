"""Position embeddings for another image size: the numbers of PyTorch's bicubic interpolation.

BLIP-2 was trained at 224 px and is used at 364 or 480: the grid of embeddings is then stretched, the
class token's is kept (LAVIS `interpolate_pos_embed`; transformers `interpolate_pos_encoding`).
"""
import numpy as np

A = -0.75  # of Keys' cubic convolution kernel in PyTorch; -0.5, as elsewhere, gives other numbers


def resize_positions(positions: np.ndarray, source: tuple[int, int],
                     grid: tuple[int, int]) -> np.ndarray:
  """float32[1 + r c, C] of a source grid (r, c) -> those of another grid, class token first.

  As `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`: no antialiasing, indices
  clamped at the edge.
  """
  if source == grid:
    return positions
  down, across = map(bicubic_weights, source, grid)
  cells = positions[1:].reshape(*source, -1).astype(np.float64)
  stretched = np.einsum("yi,xj,ijc->yxc", down, across, cells, optimize=True)
  stretched = stretched.reshape(grid[0] * grid[1], -1).astype(positions.dtype)
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
