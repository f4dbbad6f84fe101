"""Profiles of steps on demand, of a process that counts. Tracing is JAX's; here it is only noted."""
import logging
import os
import signal

import jax
import jax.numpy as jnp
import pytest

from lskd_jax.profiles import LOOK_EVERY, Profiler


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


@pytest.fixture
def traces(monkeypatch):
  """What was traced: (folder, steps in the trace)."""
  found = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: found.append([folder, 0]))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found[-1].append("ended"))
  return found


def run(profiler, traces, steps, clock=None):
  for step in steps:
    if traces and len(traces[-1]) == 2:
      traces[-1][1] += 1
    profiler(step, {"loss": jnp.float32(step)})
    if clock is not None:
      clock.now += 1.0


def test_a_file_asks_for_as_many_steps_as_it_says(tmp_path, traces, capsys):
  clock = Clock()
  profiler = Profiler(tmp_path, clock)
  run(profiler, traces, range(1, 3), clock)
  (tmp_path / "profile").write_text("2\n")
  run(profiler, traces, range(3, 12), clock)
  profiler.close()
  folder = tmp_path / "profiles" / "step-7"  # looked at when LOOK_EVERY seconds were over, after step 6
  assert LOOK_EVERY == 5 and traces == [[folder, 2, "ended"]]
  assert not (tmp_path / "profile").exists()
  assert f"profile: steps up to 8 are in {folder}" in capsys.readouterr().out


def test_a_signal_asks_for_three_steps_and_the_handler_is_given_back(tmp_path, traces):
  before = signal.getsignal(signal.SIGUSR2)
  profiler = Profiler(tmp_path, Clock())
  run(profiler, traces, range(1, 4))
  os.kill(os.getpid(), signal.SIGUSR2)
  run(profiler, traces, range(4, 20))
  profiler.close()
  assert traces == [[tmp_path / "profiles" / "step-5", 3, "ended"]]
  assert signal.getsignal(signal.SIGUSR2) == before


def test_a_run_that_ends_early_ends_its_trace(tmp_path, traces):
  (tmp_path / "profile").touch()
  profiler = Profiler(tmp_path, Clock())
  run(profiler, traces, range(1, 3))
  profiler.close()
  assert traces == [[tmp_path / "profiles" / "step-2", 1, "ended"]]


def test_what_goes_wrong_is_a_warning(tmp_path, monkeypatch, caplog):
  def refuse(folder):
    raise RuntimeError("another profile is under way")
  monkeypatch.setattr(jax.profiler, "start_trace", refuse)
  clock = Clock()
  profiler = Profiler(tmp_path, clock)
  with caplog.at_level(logging.WARNING):
    for text in ("", "many"):
      (tmp_path / "profile").write_text(text)
      run(profiler, [], range(1, 9), clock)
  profiler.close()
  assert [record.getMessage() for record in caplog.records] == [
      "no profile: another profile is under way",
      f"no profile: {tmp_path / 'profile'} holds 'many', not a number of steps"]


def test_a_real_trace_leaves_files(tmp_path):
  (tmp_path / "profile").write_text("1")
  profiler = Profiler(tmp_path, Clock())
  run(profiler, [], range(1, 4))
  profiler.close()
  assert list((tmp_path / "profiles" / "step-2").rglob("*.xplane.pb"))
