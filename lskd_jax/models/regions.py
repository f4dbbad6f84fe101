"""Region tokens: how a region reaches the student at three places, each behind a zero gate.

  P  painted onto the ViT's output tokens, after `ln_vision`: v' = v + coverage (g + e_slot) Z_p
  Q  RoIAligned tokens of v' through each cross-attention's own keys and values, under a softmax of
     their own: CA + tanh(gamma) CA_regions (qformer.py holds gamma)
  T  added to the embedding of every mention: r Z_q in passes that see the image, and nothing but
     the slot, e_slot Z_id, in the text-only pass, or the contrastive loss would be solved by
     matching boxes or pixels instead of reading

Z_p, Z_q, Z_id and gamma start at zero, so a pretrained student computes bit for bit the same until
region parameters are trained. Passes that see the image stay the same whenever it has no region.
Boxes are xyxy in [0, 1] of the model-input frame. Coordinates, weights' sums and vectors of
regions are float32; image features keep the dtype they come in.
"""
import math

from flax import nnx
import jax
import jax.numpy as jnp

from lskd_jax.models import layers
from lskd_jax.parallel import REPLICATED

FREQUENCIES = 8   # octaves of the box encoding
ROI = 3           # RoIAlign bins per side
ROI_SAMPLES = 2   # samples per bin and side, as torchvision's sampling_ratio=2


def coverage(boxes: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Share of each patch that each box covers: float32[B, R, 4] -> float32[B, R, rows, columns].

  Analytic and separable: the mean over the grid is the box's area, exactly, and a box smaller than
  a patch still covers some of it.
  """
  def overlap(low, high, size):  # [B, R] -> [B, R, size]
    cells = jnp.arange(size, dtype=jnp.float32)
    return jnp.clip(jnp.minimum(high[..., None] * size, cells + 1)
                    - jnp.maximum(low[..., None] * size, cells), 0, 1)
  along_y = overlap(boxes[..., 1], boxes[..., 3], grid[0])
  along_x = overlap(boxes[..., 0], boxes[..., 2], grid[1])
  return along_y[..., :, None] * along_x[..., None, :]


def roi_align(features: jax.Array, boxes: jax.Array, bins: int = ROI) -> jax.Array:
  """RoIAlign as one matrix product (He et al. 2017; torchvision with aligned=True).

  Args:
    features: [B, H, W, C].
    boxes: float32[B, R, 4].

  Returns:
    [B, R, bins, bins, C] as the features' dtype: y first.
  """
  def hat_weights(low, high, size):  # [B, R] -> [B, R, bins, size]
    t = (jnp.arange(bins * ROI_SAMPLES) + 0.5) / (bins * ROI_SAMPLES)
    at = low[..., None] * size - 0.5 + t * (high - low)[..., None] * size
    at = jnp.clip(at, 0, size - 1)
    hats = jax.nn.relu(1 - jnp.abs(at[..., None] - jnp.arange(size)))
    return layers.reshape(hats, *low.shape, bins, ROI_SAMPLES, size).mean(-2)
  batch, height, width, channels = features.shape
  weights_y = hat_weights(boxes[..., 1], boxes[..., 3], height)
  weights_x = hat_weights(boxes[..., 0], boxes[..., 2], width)
  weights = weights_y[:, :, :, None, :, None] * weights_x[:, :, None, :, None, :]
  weights = layers.reshape(weights, batch, boxes.shape[1] * bins**2, height * width)
  seen = _mix(weights, layers.reshape(features, batch, height * width, channels))
  return layers.reshape(seen, batch, boxes.shape[1], bins, bins, channels).astype(features.dtype)


def _mix(weights: jax.Array, rows: jax.Array) -> jax.Array:
  """Sums of rows, [B, M, N] x [B, N, C] -> float32[B, M, C].

  A plain batched product in the rows' dtype: XLA for TPUs turns a product over two axes into a convolution,
  and nests of those have overflowed the compiler's stack.
  """
  return jnp.einsum("bmn,bnc->bmc", weights.astype(rows.dtype), rows).astype(jnp.float32)


def encode_boxes(boxes: jax.Array) -> jax.Array:
  """[p, sin(2^j pi p), cos(2^j pi p)] of p = (x1, y1, x2, y2, w, h): [B, R, 4] -> [B, R, 102]."""
  p = jnp.concatenate([boxes, boxes[..., 2:] - boxes[..., :2]], -1)
  angles = p[..., None] * (2.0**jnp.arange(FREQUENCIES) * math.pi)
  angles = layers.reshape(angles, *p.shape[:-1], p.shape[-1] * FREQUENCIES)
  return jnp.concatenate([p, jnp.sin(angles), jnp.cos(angles)], -1)


def mention_slots(tokens: jax.Array, opens_bracket: jax.Array, digit: jax.Array,
                  max_regions: int | None = None, before: jax.Array | None = None) -> jax.Array:
  """The slot each token mentions, or -1: int32[B, S, T] -> int32[B, S, T].

  A token mentions slot k if it is the digit k and the token before it ends in "[", or if it holds
  the bracket itself. Both tables come from a scan of the tokenizer's vocabulary: bool[V] and
  int32[V] (-1 = no digit, max_regions + k = a piece such as "[k]"). `max_regions` None: the
  vocabulary has no such pieces (WordPiece never has). before: int32[B, S, 1], the tokens before the
  rows; None = nothing that opens a mention.
  """
  spec = jax.typeof(tokens).sharding.spec
  if before is None:
    previous = jnp.pad(tokens, ((0, 0), (0, 0), (1, 0)))[..., :-1]
  else:
    previous = jnp.concatenate([before, tokens[..., :-1]], -1)
  opened = opens_bracket.at[previous].get(out_sharding=spec)
  opened = opened if before is not None else opened & (jnp.arange(tokens.shape[-1]) > 0)
  number = digit.at[tokens].get(out_sharding=spec)
  slots = jnp.where(opened, number, -1)
  return slots if max_regions is None else jnp.where(number >= max_regions, number - max_regions,
                                                     slots)


class RegionEncoder(nnx.Module):
  """Boxes and image features -> what is added at sites P, Q and T.

  Args:
    vision: width C of the ViT's tokens. grid: (rows, columns) of its patches.
    width: width D of the Q-Former.
    max_regions: slots there can be.
    sites: which of P, Q, T are on; sites that are off contribute exactly nothing.
    decoder: width E of the word embeddings that mention vectors are added to where a decoder reads
      the texts; None = the Q-Former reads them, which also has a text-only pass.
  """

  def __init__(self, vision: int, grid: tuple[int, int], width: int, max_regions: int, sites: str,
               rngs, decoder: int | None = None):
    if set(sites) - set("PQT"):
      raise ValueError(f"region sites {sites!r}: only the letters P, Q and T are known")
    self.grid, self.sites = grid, sites
    encoding = 6 * (1 + 2 * FREQUENCIES)
    whole = REPLICATED  # these matrices are small
    self.geometry_in = layers.Dense((encoding,), (width,), jax.P(None, None), rngs)
    self.geometry_out = layers.Dense((width,), (width,), jax.P(None, None), rngs)
    self.content = layers.Dense((vision,), (width,), jax.P(None, None), rngs, bias=False)
    self.slot = layers.normal(rngs.params(), (max_regions, width), whole)
    self.paint_gate = layers.constant(0.0, (width, vision))     # Z_p
    self.mention_gate = layers.constant(0.0, (width, decoder or width))  # Z_q, or a decoder's Z_lm
    self.identity_gate = None if decoder else layers.constant(0.0, (width, width))  # Z_id

  def __call__(self, features: jax.Array, boxes: jax.Array, valid: jax.Array):
    """Applies site P and prepares sites Q and T.

    Args:
      features: [B, 1 + rows * columns, C], class token first.
      boxes: float32[B, R, 4]; valid: bool[B, R].

    Returns:
      painted features as they came, RoI tokens [B, R * 9, C], mention vectors [B, R, D or E].
    """
    boxes, valid = jax.lax.optimization_barrier((boxes, valid))
    patches = features[:, 1:]
    batch, count, vision = patches.shape
    cover = layers.reshape(coverage(boxes, self.grid), *valid.shape, count) * valid[..., None]
    # Pooled before painting, so that what a mention sees does not depend on other regions.
    pooled = _mix(cover, patches) / (cover.sum(-1, keepdims=True) + 1e-6)
    geometry = self.geometry_out(jax.nn.gelu(self.geometry_in(encode_boxes(boxes))))
    mention = layers.rms_norm(geometry + self.content(pooled))
    mention = (mention @ self.mention_gate[...]) * valid[..., None] if "T" in self.sites else None
    painted = features
    if "P" in self.sites:
      paint = (geometry + self.slot[...]) @ self.paint_gate[...]
      paint = _mix(cover.swapaxes(1, 2), (paint * valid[..., None]).astype(features.dtype))
      painted += jnp.pad(paint, ((0, 0), (1, 0), (0, 0))).astype(features.dtype)
    tokens = None
    if "Q" in self.sites:
      tokens = roi_align(layers.reshape(painted[:, 1:], batch, *self.grid, vision), boxes)
      tokens = layers.reshape(tokens, batch, boxes.shape[1] * ROI**2, vision)
    return painted, tokens, mention

  def identities(self) -> jax.Array:
    """What a mention of slot k carries in the text-only pass: [R, D]. Takes no image, no boxes."""
    return layers.rms_norm(self.slot[...]) @ self.identity_gate[...]


def at_mentions(slots: jax.Array, vectors: jax.Array) -> jax.Array:
  """The vector of each mentioned slot, zero elsewhere: int32[B, S, T], [(B,) R, D] -> [B, S, T, D]."""
  chosen = jax.nn.one_hot(slots, vectors.shape[-2], dtype=vectors.dtype)
  equation = "bstr,brd->bstd" if vectors.ndim == 3 else "bstr,rd->bstd"
  return jnp.einsum(equation, chosen, vectors)
