"""Plans: topologies, floors, costs, and a plan for CPU devices from the command line to its text."""
import contextlib
import json
import math
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from data_pipeline.records import DataError
from lskd_jax import cli
from lskd_jax.config_files import load_config
from lskd_jax.plan import chips, estimate, report, run, topology
from tests.lskd_jax.tiny_models import OVERRIDES

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "scenes_student.py")
TINY = [*OVERRIDES, "--config.data.batch_size=8", "--config.model.qformer.depth=2",
        "--config.train.mesh.fsdp=-1"]

# What `measure` could have found: 8 chips of v5e, and numbers that are easy to divide.
FACTS = {
  "task": "student", "topology": "v5e:2x4", "chips": 8, "mesh": {"data": 1, "fsdp": 8}, "batch_size": 64,
  "statements": 256, "parameters": {"trainable": 10, "frozen": 20},
  "bytes": {"trainable": 1e9, "frozen": 2e9, "optimizer": 2e9, "batch": 1e6},
  "memory": {"arguments": 5e9, "temporaries": 6e9, "outputs": 3.5e9, "aliased": 3e9, "code": 1e8},
  "refused": "", "flops": {"model": 8 * 197e12 * 0.4, "executed": 8 * 197e12 * 0.5},
  "collectives": [dict(kind="all-gather", crosses=False, group=8, sites=1, times=2, result=1e9, network=9e9)],
  "traffic": 819e9 * 0.25, "places": {"models/vit.py:80 Block.__call__": 819e9 * 0.25}, "notes": [],
  "seconds": 90.0, "low_effort": False, "compiler": "libtpu 1"}
V5E = topology.parse("v5e:2x4")


# --- topologies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text,chips,slices", [
  ("v5e:4x4", 16, 1), ("v5p:4x4x4", 64, 1), ("2x v5e:16x16", 512, 2), ("2xv5e:4x4", 32, 2), ("cpu:8", 8, 1)])
def test_a_topology_is_a_kind_and_a_shape(text, chips, slices):
  found = topology.parse(text)
  assert (found.chips, found.slices) == (chips, slices)


@pytest.mark.parametrize("text,words", [
  ("v9:4x4", "no KIND:SHAPE"), ("v5e", "such as v5e:4x4"), ("tpu7x:2x2x1", "TPU7x"), ("v5e:0x4", "no chips")])
def test_another_topology_is_refused_with_what_there_is(text, words):
  with pytest.raises(DataError, match=words):
    topology.parse(text)


def test_a_machine_without_libtpu_is_told_how_to_get_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(DataError, match=r"pip install -e '.\[tpu\]'.*cpu:16"):
    topology.devices(topology.parse("v5e:4x4"))


def test_links_of_a_corner_chip_are_doubled_where_the_axis_is_a_ring():
  links = lambda text: round(chips.ici(topology.parse(text)) / 1e9)
  # The four topologies of a prototype's plan: 2, 4, 6 and 2 links.
  assert [links(text) for text in ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:4x4")] == [90, 180, 540, 180]
  assert links("v5p:2x2x1") == 180


# --- floors and costs ------------------------------------------------------------------------------


def test_floors_are_what_each_resource_needs_at_its_peak():
  speed = estimate.speed(FACTS, V5E)
  assert speed.floors == pytest.approx({"compute": 0.5, "memory": 0.25, "ici": 0.1, "dcn": 0})
  assert (speed.bound, speed.overlapped) == ("compute", pytest.approx(0.5))
  assert speed.serial == pytest.approx(0.85)
  assert speed.rate == pytest.approx(512)
  # Model FLOPs need 0.4 s at the peak.
  assert (speed.mfu, speed.mfu_serial) == (pytest.approx(0.8), pytest.approx(0.4 / 0.85))


def test_what_crosses_slices_goes_at_the_speed_of_dcn():
  row = dict(FACTS["collectives"][0], crosses=True, network=3.125e9 * 2)
  speed = estimate.speed({**FACTS, "collectives": [row]}, V5E)
  assert speed.floors["dcn"] == pytest.approx(2) and speed.bound == "dcn"


def test_a_step_fits_when_arguments_temporaries_code_and_new_outputs_do():
  assert estimate.memory_needed(FACTS) == pytest.approx(5e9 + 6e9 + 0.5e9 + 0.1e9)
  assert estimate.fits(FACTS, V5E)
  memory = FACTS["memory"] | {"temporaries": 12e9}
  assert not estimate.fits({**FACTS, "memory": memory}, V5E)
  assert not estimate.fits({**FACTS, "memory": None}, V5E)


def test_the_best_interval_between_saves_is_youngs():
  assert estimate.save_interval(10, 7200) == pytest.approx(math.sqrt(2 * 10 * 7200))


def test_a_run_without_preemptions_costs_its_steps_and_its_saves():
  found = estimate.cost(2.0, 900, 16, 1.5, preemptions=0, save_every=100, save_seconds=200, recovery=1e9)
  assert found.hours == pytest.approx((1800 + 9 * 200) / 3600)
  assert found.dollars == pytest.approx(found.hours * 16 * 1.5)
  assert found.lost == pytest.approx(0.5)


def test_each_preemption_costs_half_an_interval_and_the_recovery():
  # 24 a day, each 50 steps of 2 s and 260 s: a tenth of the time. 1800 s of work take 2000 s.
  found = estimate.cost(2.0, 900, 1, 1, preemptions=24, save_every=100, save_seconds=0, recovery=260)
  assert found.hours * 3600 == pytest.approx(2000)


def test_a_run_that_loses_more_than_it_gains_never_ends():
  found = estimate.cost(2.0, 900, 1, 1, preemptions=240, save_every=1000, save_seconds=0, recovery=0)
  assert (found.hours, found.dollars, found.lost) == (None, None, 1.0)


# --- the text --------------------------------------------------------------------------------------


def text(facts=FACTS, **changes) -> str:
  found = report.plan(facts, V5E, report.Run(**changes), 1000)
  return report.text(found, V5E)


def test_a_plan_says_that_nothing_ran_what_bounds_it_and_what_it_costs():
  shown = text()
  assert shown.splitlines()[0] == "plan for v5e:2x4: compiled, not run"
  assert "fits: +5.31 GB" in shown
  assert "<- bounds the step" in next(line for line in shown.splitlines() if "executed FLOPs" in line)
  assert "512 statements/s, 64 a chip" in shown
  # 5 million statements, 256 a step of 0.5 s: 19532 steps, and 19 saves of 5 s.
  assert "19532 steps, 2.7 h, 22 chip-hours, $26 at $1.2" in shown
  # sqrt(2 x 5 s x half a day) = 657 s
  assert "save every 1315 steps (10:57)" in shown


def test_saves_by_the_clock_count_where_they_come_sooner():
  lost = lambda *interval: report.plan(FACTS, V5E, report.Run(), *interval)["costs"]["spot"]["lost"]
  assert lost(1000, 1.0) == lost(120) != lost(1000)  # steps of 0.5 s
  assert lost(1000, 60.0) == lost(1000)
  shown = report.text(report.plan(FACTS, V5E, report.Run(), 1000, 1.0), V5E)
  assert "the config has train.save_every=1000 and train.save_minutes=1" in shown
  assert "2 preemptions a day without notice" in shown


def test_a_given_price_replaces_the_list():
  shown = text(price=2.0, preemptions=0.0)
  assert "prices: yours" in shown and "$44 at $2" in shown and "spot" not in shown


def test_a_step_that_was_refused_says_what_the_compiler_said():
  shown = text({**FACTS, "memory": None, "refused": "Used 20G of 15.75G hbm"})
  assert "DOES NOT FIT: the compiler refused it (Used 20G of 15.75G hbm)" in shown


# --- from the command line -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """A cache of the tests' own."""
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def planned(cache):
  """A plan for eight CPU devices, by the command in a process of its own; and what it wrote."""
  out = cache / "plan.json"
  done = subprocess.run([*command("cpu:8"), "--out", str(out)], cwd=ROOT, env=environment(cache), text=True,
                        capture_output=True, check=False, timeout=300)
  assert done.returncode == 0, done.stderr
  return done, json.loads(out.read_text())


def command(named: str) -> list[str]:
  return [sys.executable, "-m", "lskd_jax.cli", "plan", "--config", CONFIG, "--topology", named, *TINY]


def environment(cache) -> dict:
  return {**os.environ, "XDG_CACHE_HOME": str(cache)}


def test_cpu_devices_give_sharding_flops_and_collectives_and_say_what_is_missing(planned):
  done, found = planned
  assert found["status"] == "compiled, not run" and found["mesh"]["fsdp"] == 8
  assert found["flops"]["executed"] >= found["flops"]["model"] > 1e6
  assert {"all-gather", "all-reduce"} <= {row["kind"] for row in found["collectives"]}
  assert "speed" not in found and "CPU devices have no published peaks" in done.stdout


def test_what_a_device_holds_is_its_shards(planned):
  _, found = planned
  whole = 4 * found["parameters"]["trainable"]
  assert whole / 8 < found["bytes"]["trainable"] < whole / 2  # biases and norms are whole everywhere
  assert found["bytes"]["optimizer"] == pytest.approx(2 * found["bytes"]["trainable"], rel=0.01)
  # The compiler leaves out what the step does not read, such as the numbers of the statements.
  assert found["memory"]["arguments"] == pytest.approx(sum(found["bytes"].values()), rel=0.1)


def test_the_second_plan_comes_from_the_cache(planned, cache, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
  monkeypatch.setattr(run, "compiled", lambda *arguments: pytest.fail("compiled again"))
  assert cli.main([*command("cpu:8")[3:]]) == 0
  assert capsys.readouterr().out == planned[0].stdout


def test_what_the_step_does_not_depend_on_does_not_compile_again():
  name = lambda *overrides: run.key(load_config(CONFIG, overrides), V5E, False)
  assert name() == name("seed=7", "data.corpus=there", "train.save_every=5")
  assert name() != name("data.batch_size=8")
  assert name() != run.key(load_config(CONFIG), V5E, True)


def test_a_tokenizer_that_has_come_makes_another_plan(tmp_path):
  loaded = load_config(CONFIG, [f"data.tokenizer={tmp_path / 'words'}"])
  names = [run.key(loaded, V5E, False)]
  (tmp_path / "words").mkdir()
  for text in ("{}", '{"model": 1}'):
    (tmp_path / "words" / "tokenizer.json").write_text(text)
    names.append(run.key(loaded, V5E, False))
  assert len(set(names)) == 3


@pytest.mark.parametrize("words,line", [
  (["--epochs", "0"], "'0' is not a number above 0"),
  (["--preemptions-per-day", "-2"], "'-2' is not a number from 0 on"),
  (["--save-seconds", "-1"], "'-1' is not a number from 0 on"),
  (["--price", "-1"], "'-1' is not a number from 0 on")])
def test_numbers_that_cannot_be_are_refused(words, line, capsys):
  with pytest.raises(SystemExit):
    cli.main([*command("v5e:4x4")[3:], *words])
  assert line in capsys.readouterr().err


def test_an_interval_between_saves_that_is_none_is_refused_before_anything_is_compiled(monkeypatch, capsys):
  monkeypatch.setattr(run, "measured", lambda *arguments: pytest.fail("compiled"))
  assert cli.main([*command("v5e:4x4")[3:], "--config.train.save_every=0"]) == 1
  assert "train.save_every=0 must be at least 1" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells processes of their parent's end")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_plan_and_its_compiler_at_once(tmp_path, number):
  process = subprocess.Popen(command("cpu:4"), cwd=ROOT, env=environment(tmp_path), text=True,
                             stderr=subprocess.PIPE)
  seen = ""
  while "tracing" not in seen:
    seen += process.stderr.read(1)
    assert process.poll() is None
  (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
  os.kill(int(worker), signal.SIGSTOP)  # as a compiler that has long to go
  try:
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    if number == signal.SIGINT:
      assert process.returncode == 130 and "interrupted" in rest
    until(lambda: not runs(worker))
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.kill(int(worker), signal.SIGKILL)


def until(condition):
  end = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < end, "it never came"
    time.sleep(0.01)


def runs(pid: str) -> bool:
  """Whether a process does anything; one that has ended may still have an entry."""
  try:
    return " Z " not in Path(f"/proc/{pid}/stat").read_text()
  except FileNotFoundError:
    return False


def test_a_compiler_that_the_system_killed_is_one_line(tmp_path, monkeypatch):
  killed = tmp_path / "killed"
  killed.write_text("#!/bin/sh\nkill -9 $$\n")
  killed.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(killed))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  with pytest.raises(DataError, match="the compiler was killed while starting for v5e:2x4.*--low-effort"):
    run.measured(CONFIG, [], V5E, quiet=True)


def test_a_batch_that_the_devices_cannot_share_is_one_line(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert cli.main([*command("cpu:3")[3:]]) == 1
  error = capsys.readouterr().err.splitlines()[-1]
  assert "data.batch_size=8: the mesh splits batches over 3 groups" in error
