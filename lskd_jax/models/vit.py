"""Vision transformer: pixels -> one token per patch and a class token (Dosovitskiy et al. 2021).

Layout and names follow EVA-CLIP as BLIP-2 uses it: pre-norm blocks, exact GELU, absolute position
embeddings, no final norm (BLIP-2's `ln_vision` belongs to the student, because it is trained). CLIP's
own ViT (Radford et al. 2021) differs by a norm before the blocks, another GELU, and patches without bias.
"""
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from lskd_jax import parallel
from lskd_jax.models import fused_attention, layers
from lskd_jax.parallel import ACT_B, ACT_BST3HK, REPLICATED, W_D3HK, W_HKD

# CLIP's pixel statistics, used by BLIP-2 (LAVIS `BlipImageBaseProcessor`).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VitConfig:
  image_size: int | tuple[int, int] = 224  # of the input, px: the side of a square, or (height, width)
  patch: int = 14            # side of a patch, px
  width: int = 1408
  depth: int = 39
  heads: int = 16
  hidden: int = 6144         # width of the blocks' MLP
  eps: float = 1e-6
  activation: str = "gelu"   # of the MLP: gelu | quick_gelu
  input_norm: bool = False   # a norm before the first block
  patch_bias: bool = True
  attention: str = "auto"    # fused (in one kernel, TPUs only) | plain | auto: fused on TPUs
  remat: str = "none"
  scan: bool = True

  def __post_init__(self):
    if self.attention not in ("auto", "fused", "plain"):
      raise ValueError(f"attention {self.attention!r} is unknown: choose auto, fused or plain")
    size = self.image_size
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)  # JSON has lists only
    if len(pair) != 2 or any(type(side) is not int or side < self.patch for side in pair):
      raise ValueError(f"image_size={size!r}: give a side or (height, width), each at least a patch, "
                       f"{self.patch} px")
    object.__setattr__(self, "image_size", pair[0] if pair[0] == pair[1] else pair)

  @property
  def size(self) -> tuple[int, int]:
    """(height, width) of the input, px."""
    return (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size

  @property
  def grid(self) -> tuple[int, int]:
    """(rows, columns) of patches; pixels beyond the last whole patch are unused."""
    return self.size[0] // self.patch, self.size[1] // self.patch

  @property
  def tokens(self) -> int:
    """The class token and one for each patch."""
    return 1 + self.grid[0] * self.grid[1]


# The two towers of the published BLIP-2, both without their last block.
EVA_VIT_G = VitConfig()
CLIP_VIT_L = VitConfig(width=1024, depth=23, hidden=4096, eps=1e-5, activation="quick_gelu",
                       input_norm=True, patch_bias=False)


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: VitConfig, rngs, dtype):
    head = config.width // config.heads
    self.norm1 = layers.layer_norm(config.width, config.eps, rngs)
    self.qkv = layers.Dense((config.width,), (3, config.heads, head), W_D3HK, rngs, dtype=dtype)
    self.out = layers.Dense((config.heads, head), (config.width,), W_HKD, rngs, dtype=dtype)
    self.norm2 = layers.layer_norm(config.width, config.eps, rngs)
    self.mlp = layers.Mlp(config.width, config.hidden, rngs, dtype, config.activation)
    self.attention = config.attention
    self.interpret = False  # tests run the kernel on CPUs

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, 1, N, C] -> [B, 1, N, C]."""
    fused = self.attention == "fused" or self.attention == "auto" and parallel.on_tpu()
    x = x + (self._fused if fused else self._plain)(self.norm1(x))
    return x + self.mlp(self.norm2(x))

  def _plain(self, x: jax.Array) -> jax.Array:
    qkv = self.qkv(x, ACT_BST3HK)
    return self.out(layers.attend(*(qkv[..., i, :, :] for i in range(3))))

  def _fused(self, x: jax.Array) -> jax.Array:
    """The same in one kernel, for which tokens are padded before they become heads: once, not three times."""
    tokens = x.shape[2]
    spare = fused_attention.padded(tokens) - tokens
    x = jnp.pad(x[:, 0], ((0, 0), (0, spare), (0, 0))).astype(self.qkv.dtype)
    heads = jnp.einsum("btc,cihk->ibhtk", x, layers.whole(self.qkv.kernel[...], x.dtype),
                       out_sharding=jax.P(None, *fused_attention.LAYOUT))
    heads += self.qkv.bias[...].astype(x.dtype)[:, None, :, None]
    seen = fused_attention.attend(*heads, tokens, self.interpret)
    return self.out(seen[:, :, :tokens].swapaxes(1, 2)[:, None])


class Vit(nnx.Module):
  """uint8[B, H, W, 3] -> [B, 1 + rows * columns, C]; the class token stands first."""

  def __init__(self, config: VitConfig, rngs, dtype=jnp.float32):
    self.config = config
    self.dtype = dtype
    self.patchify = layers.Dense((config.patch**2 * 3,), (config.width,), jax.P(None, "fsdp"), rngs,
                                 bias=config.patch_bias, dtype=dtype)
    self.class_token = layers.normal(rngs.params(), (config.width,), REPLICATED)
    self.positions = layers.normal(rngs.params(), (config.tokens, config.width), REPLICATED)
    self.input_norm = layers.layer_norm(config.width, config.eps, rngs) if config.input_norm else None
    self.stack = layers.Stack(lambda rngs: Block(config, rngs, dtype), config.depth, rngs,
                              remat=config.remat, scan=config.scan)

  def __call__(self, image: jax.Array) -> jax.Array:
    config = self.config
    batch, (rows, columns), patch = image.shape[0], config.grid, config.patch
    pixels = image[:, :rows * patch, :columns * patch].astype(jnp.float32) / 255
    pixels = (pixels - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)
    patches = layers.reshape(pixels, batch, rows, patch, columns, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    x = self.patchify(layers.reshape(patches, batch, rows * columns, patch**2 * 3))
    first = jnp.broadcast_to(self.class_token[...], (batch, 1, config.width), out_sharding=ACT_B)
    x = jnp.concatenate([first.astype(x.dtype), x], axis=1) + self.positions[...].astype(x.dtype)
    if self.input_norm is not None:
      x = self.input_norm(x).astype(x.dtype)
    return self.stack(lambda block, x, _: (block(x), None), x[:, None])[0][:, 0]
