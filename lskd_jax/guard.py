"""The group `guard` of a config: a run that has not left chance when it is half done is extended, once."""


def needs_more(config, measured: dict, now: int) -> bool:
  """Whether a run that was not extended yet is to be.

  measured: the metrics of the evaluation after `now` steps, or the line that metrics.jsonl has of it.
  """
  guard = config.guard
  return (guard.metric in measured and guard.at * config.optim.steps <= now < config.optim.steps
          and float(measured[guard.metric]) < guard.below)


def extended_after(config, lines: list[dict]) -> int | None:
  """The step after which the run was extended whose metrics.jsonl has these lines; None if it was not."""
  return next((line["step"] for line in lines if needs_more(config, line, line["step"])), None)


def extended_steps(config) -> int:
  """The steps of a run once it was extended."""
  return round(config.optim.steps * config.guard.factor)
