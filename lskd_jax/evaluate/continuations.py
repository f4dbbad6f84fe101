"""What follows prompts about one image: how likely given texts are, and what a student writes.

The image is computed once (`look`), however many prompts there are. Axes: B prompts, P tokens of a
prompt, S texts that continue it, T tokens of a text, G tokens that are written.
"""
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lskd_jax import parallel
from lskd_jax.models.generate import Decoding
from lskd_jax.models.student import Sight, Student


class Continuer:
  """Reads prompts and continues them with one student; compiles once per shape and Decoding.

  Args:
    graph, state: of a student of either kind, as `models.build.load` returns them.
  """

  def __init__(self, graph, state):
    self.state = state

    @jax.jit
    def look(state, batch):
      student = nnx.merge(graph, state)
      sight = student.see(student.vit(batch["image"]), batch["boxes"], batch["region_valid"])
      image = student.read_image(sight)
      # Prompts see an image through the query states or, without a decoder, through their cache.
      return sight._replace(memory=None), image[1] if isinstance(student, Student) else image

    def for_prompts(student, seen, batch):
      """The image once for each prompt, and the prompts as the student has read them."""
      count = batch["prompt"].shape[0]

      def spread(x, axis=0):
        shape = (*x.shape[:axis], count, *x.shape[axis + 1:])
        return jnp.broadcast_to(x, shape, out_sharding=jax.typeof(x).sharding.spec)
      sight = jax.tree.map(spread, seen[0])
      batch_axis = 2 if isinstance(student, Student) else 0  # of [G, E, B, Q, h, k], or [B, Q, E]
      image = jax.tree.map(lambda x: spread(x, batch_axis), seen[1])
      return sight, student.read(sight, image, batch["prompt"], batch["real"])

    @jax.jit
    def score(state, seen, batch):
      student = nnx.merge(graph, state)
      return student.likelihoods(*for_prompts(student, seen, batch), batch["tokens"])

    @functools.partial(jax.jit, static_argnames="decoding")
    def write(state, seen, batch, seed, decoding):
      student = nnx.merge(graph, state)
      key = jax.random.key(seed)
      return student.generate(*for_prompts(student, seen, batch), decoding, key)
    self._look, self._score, self._write = look, score, write

  def look(self, row: dict) -> tuple[Sight, jax.Array]:
    """What the prompts need of an image: `image`, `boxes` and `region_valid`, each with B = 1."""
    return self._look(self.state, _put(row))

  def likelihoods(self, seen, rows: dict) -> np.ndarray:
    """Log-likelihood of every token after its prompt, by a generative student.

    Args:
      seen: from `look`. rows: `prompt` int32[B, P], padded on the left, `real` bool[B, P], `tokens`
        int32[B, S, T].

    Returns:
      float64[B, S, T].
    """
    return np.asarray(self._score(self.state, seen, _put(rows)), np.float64)

  def write(self, seen, rows: dict, decoding: Decoding, seed: int = 0) -> np.ndarray:
    """One text after each prompt: `prompt` and `real` as above -> int32[B, G]."""
    return np.asarray(self._write(self.state, seen, _put(rows), np.uint32(seed), decoding).tokens)


def _put(rows: dict) -> dict:
  return parallel.put_batch(rows, jax.sharding.get_mesh())
