"""From images to batches: describe, teach, judge, filter, publish and load. Numpy only, no jax."""
