"""The process that compiles: `python -m lskd_jax.plan.worker REQUEST`, started by `run.measured`.

Its own process because libtpu reads its environment when it is loaded, and because a compiler cannot be
interrupted, and may crash. It writes a JSON line for each stage that begins, and one at the end.
"""
import json
import signal
import sys

from lskd_jax import signals


def main(text: str) -> None:
  """Measures the request {config, overrides, topology, low_effort}; see `measure.measure`."""
  request = json.loads(text)
  say = lambda **line: print(json.dumps(line), flush=True)
  say(stage="starting JAX")
  from lskd_jax.config_files import load_config
  from lskd_jax.plan import measure, topology
  try:
    config = load_config(request["config"], request["overrides"])
    say(facts=measure.measure(config, topology.parse(request["topology"]), request["low_effort"],
                              lambda stage: say(stage=stage)))
  except ValueError as error:
    from lskd_jax.errors import in_one_line, is_about_input
    if not is_about_input(error):
      raise
    say(error=in_one_line(error))


if __name__ == "__main__":
  signals.end_with_parent(signal.SIGKILL)  # here: JAX warns of a fork that is more than an exec
  main(sys.argv[1])
