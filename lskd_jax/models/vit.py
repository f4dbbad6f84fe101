"""Vision transformer: pixels -> one token per patch and a class token (Dosovitskiy et al. 2021).

Layout and names follow EVA-CLIP as BLIP-2 uses it: pre-norm blocks, exact GELU, absolute position
embeddings, no final norm (BLIP-2's `ln_vision` belongs to the student, because it is trained).
"""
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from lskd_jax.models import layers
from lskd_jax.parallel import ACT_B, ACT_BST3HK, REPLICATED, W_D3HK, W_HKD

# CLIP's pixel statistics, used by BLIP-2 (LAVIS `BlipImageBaseProcessor`).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VitConfig:
  image_size: int = 224      # side of the square input, px
  patch: int = 14            # side of a patch, px
  width: int = 1408
  depth: int = 39
  heads: int = 16
  hidden: int = 6144         # width of the blocks' MLP
  eps: float = 1e-6
  remat: str = "none"
  scan: bool = True

  @property
  def grid(self) -> int:
    """Patches per side; pixels beyond the last whole patch are unused."""
    return self.image_size // self.patch


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: VitConfig, rngs, dtype):
    head = config.width // config.heads
    self.norm1 = layers.layer_norm(config.width, config.eps, rngs)
    self.qkv = layers.Dense((config.width,), (3, config.heads, head), W_D3HK, rngs, dtype=dtype)
    self.out = layers.Dense((config.heads, head), (config.width,), W_HKD, rngs, dtype=dtype)
    self.norm2 = layers.layer_norm(config.width, config.eps, rngs)
    self.mlp = layers.Mlp(config.width, config.hidden, rngs, dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, 1, N, C] -> [B, 1, N, C]."""
    qkv = self.qkv(self.norm1(x), ACT_BST3HK)
    q, k, v = (qkv[..., i, :, :] for i in range(3))
    x = x + self.out(layers.attend(q, k, v))
    return x + self.mlp(self.norm2(x))


class Vit(nnx.Module):
  """uint8[B, H, W, 3] -> [B, 1 + grid^2, C]; the class token stands first."""

  def __init__(self, config: VitConfig, rngs, dtype=jnp.float32):
    self.config = config
    self.dtype = dtype
    self.patchify = layers.Dense((config.patch**2 * 3,), (config.width,), jax.P(None, "fsdp"), rngs,
                                 dtype=dtype)
    self.class_token = layers.normal(rngs.params(), (config.width,), REPLICATED)
    self.positions = layers.normal(rngs.params(), (1 + config.grid**2, config.width), REPLICATED)
    self.stack = layers.Stack(lambda rngs: Block(config, rngs, dtype), config.depth, rngs,
                              remat=config.remat, scan=config.scan)

  def __call__(self, image: jax.Array) -> jax.Array:
    config = self.config
    batch, side = image.shape[0], config.grid * config.patch
    pixels = image[:, :side, :side].astype(jnp.float32) / 255
    pixels = (pixels - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)
    grid, patch = config.grid, config.patch
    patches = layers.reshape(pixels, batch, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    x = self.patchify(layers.reshape(patches, batch, grid**2, patch**2 * 3))
    first = jnp.broadcast_to(self.class_token[...], (batch, 1, config.width), out_sharding=ACT_B)
    x = jnp.concatenate([first.astype(x.dtype), x], axis=1) + self.positions[...].astype(x.dtype)
    return self.stack(lambda block, x, _: (block(x), None), x[:, None])[0][:, 0]
