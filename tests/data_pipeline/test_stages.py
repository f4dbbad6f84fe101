"""Stages: the files they leave, and that nothing is lost or half done when they are stopped."""

import errno
import json
import os
from pathlib import Path
import subprocess
import sys
import threading
import time

import pytest

from data_pipeline import stages
from data_pipeline.records import DataError, ImageRecord, Region, Statement

REPO = Path(__file__).resolve().parents[2]


def record(number):
  """A record whose count of regions and statements depends on its number."""
  regions = tuple(Region(k, (0.0, 0.0, 5.0, 5.0)) for k in range(number % 3))
  return ImageRecord(f"{number}.png", number, 10, 10, regions, (Statement("s", "", "", ""),))


def work(number):
  if number % 5 == 4:
    raise DataError(f"{number} ends in 4 or 9")
  return record(number)


def run(out, items=range(10), do=work, options=None, shards=3, **others):
  parts = stages.split_evenly(list(items), shards)
  return stages.run_stage("count", parts, do, out, options or {"seed": 1}, False, **others)


def contents(folder):
  return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


# ---- what a stage leaves ----


def test_a_stage_writes_shards_rejections_and_a_summary(tmp_path):
  summary = run(tmp_path / "out")
  assert summary == {
    "stage": "count",
    "shards": 3,
    "records": 8,
    "regions": 0 + 1 + 2 + 0 + 2 + 0 + 1 + 2,  # numbers 0 1 2 3, 5 6 7 8
    "statements": 8,
    "rejected": 2,
    "records_by_shard": [3, 2, 3],
  }
  assert sorted(contents(tmp_path / "out")) == [
    "rejected-00000-of-00003.jsonl",
    "rejected-00001-of-00003.jsonl",
    "rejected-00002-of-00003.jsonl",
    "shard-00000-of-00003.jsonl",
    "shard-00001-of-00003.jsonl",
    "shard-00002-of-00003.jsonl",
    "stage.json",
    "summary.json",
  ]
  rejected = json.loads((tmp_path / "out" / "rejected-00001-of-00003.jsonl").read_text())
  assert rejected == {"reason": "4 ends in 4 or 9", "where": "4"}
  assert list(stages.read_records(tmp_path / "out")) == [
    record(n) for n in (0, 1, 2, 3, 5, 6, 7, 8)
  ]
  assert stages.count_records(tmp_path / "out") == 8


def test_one_item_may_give_several_records_rejections_or_nothing(tmp_path):
  def several(number):
    if number == 0:
      return None
    return [record(number), DataError("half of it is wrong"), {"image": "extra.png"}]

  summary = run(tmp_path, items=[0, 1], do=several, shards=1)
  assert (summary["records"], summary["rejected"]) == (2, 1)


def test_a_stage_reads_the_shards_of_the_one_before(tmp_path):
  run(tmp_path / "a")
  shards = stages.open_shards(tmp_path / "a")
  assert [len(shard) for shard in shards] == [3, 2, 3]
  summary = stages.run_stage("copy", shards, lambda r: r, tmp_path / "b", {}, progress=False)
  assert summary["records"] == 8
  assert list(stages.read_records(tmp_path / "b")) == list(stages.read_records(tmp_path / "a"))


def test_items_may_come_from_a_function_called_only_for_unfinished_shards(tmp_path):
  called = []

  def items(k):
    called.append(k)
    return iter([k])

  parts = [lambda: items(0), lambda: items(1)]
  for _ in range(2):
    stages.run_stage("lazy", parts, record, tmp_path, {}, progress=False, inputs="two numbers")
  assert called == [0, 1]


def test_threads_change_the_speed_but_no_byte(tmp_path):
  together = threading.Barrier(4, timeout=10)  # passes only when four items are worked on at once

  def waits(number):
    together.wait()
    return work(number)

  run(tmp_path / "one", items=range(8), shards=1)
  run(tmp_path / "four", items=range(8), do=waits, shards=1, workers=4)
  assert contents(tmp_path / "one") == contents(tmp_path / "four")


@pytest.mark.parametrize("count, shards, sizes", [(10, 3, [3, 3, 4]), (2, 5, [1, 1]), (0, 3, [0])])
def test_split_evenly(count, shards, sizes):
  parts = stages.split_evenly(list(range(count)), shards)
  assert [len(part) for part in parts] == sizes
  assert sum(parts, []) == list(range(count))


# ---- going on ----


def test_finished_shards_are_skipped_and_their_number_is_said(tmp_path, capsys):
  first = run(tmp_path)
  before = contents(tmp_path)
  (tmp_path / "shard-00001-of-00003.jsonl").unlink()
  done = []

  def counting(number):
    done.append(number)
    return work(number)

  again = stages.run_stage(
    "count", stages.split_evenly(list(range(10)), 3), counting, tmp_path, {"seed": 1}
  )
  assert again == first and contents(tmp_path) == before
  assert done == [3, 4, 5]
  assert "count: 2 of 3 shards were already done" in capsys.readouterr().err


def test_a_stage_that_kept_nothing_is_run_again(tmp_path):
  def refuses(number):
    raise DataError("no picture of it in this folder")

  assert run(tmp_path, do=refuses)["rejected"] == 10
  assert len(list(tmp_path.glob("rejected-*.jsonl"))) == 3  # to read until then
  summary = run(tmp_path)
  assert (summary["records"], summary["rejected"]) == (8, 2)
  assert len(list(stages.read_records(tmp_path))) == 8


@pytest.mark.parametrize(
  "change, culprit",
  [
    ({"options": {"seed": 2}}, r"options \{'seed': 1\}, now asked for \{'seed': 2\}"),
    ({"items": range(11)}, "inputs"),
    ({"shards": 2}, "inputs|shards"),
  ],
)
def test_a_folder_of_other_options_or_inputs_is_refused(tmp_path, change, culprit):
  run(tmp_path)
  before = contents(tmp_path)
  with pytest.raises(DataError, match=f"{tmp_path.name}.*made with ({culprit})"):
    run(tmp_path, **change)
  assert contents(tmp_path) == before


def test_a_failing_work_function_leaves_finished_shards_and_no_partial_file(tmp_path):
  def breaks(number):
    if number == 7:
      raise OSError(errno.ENOSPC, "not ours")  # an error of the work itself is not reworded
    return work(number)

  with pytest.raises(OSError, match="not ours") as caught:
    run(tmp_path, do=breaks)
  assert not isinstance(caught.value, DataError)
  assert sorted(contents(tmp_path)) == [
    "rejected-00000-of-00003.jsonl",
    "rejected-00001-of-00003.jsonl",
    "shard-00000-of-00003.jsonl",
    "shard-00001-of-00003.jsonl",
    "stage.json",
  ]


def test_two_processes_cannot_write_to_one_folder(tmp_path):
  def meddle(number):
    with pytest.raises(DataError, match="another process is writing"):
      run(tmp_path)
    return work(number)

  run(tmp_path, items=[1], do=meddle, shards=1)


# ---- killed at any moment ----

# Runs a stage again and again in a child process that is killed: first at its n-th system call
# that touches a file, for every n, then after a random time. After each kill every visible file
# must be one of the whole files of an undisturbed run; at the end all of them must be there.
KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from data_pipeline import stages
from data_pipeline.records import DataError

def work(number):
  if number % 5 == 4:
    raise DataError("no")
  time.sleep(0.001)
  return {"image": str(number), "pad": "x" * 3000}

def run(out):
  parts = stages.split_evenly(list(range(12)), 3)
  stages.run_stage("killed", parts, work, out, {}, progress=False)

def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}

def check(folder, whole):
  for name, data in contents(folder).items():
    assert name.endswith(".partial") or whole[name] == data, name

def child(out, kill_at):
  pid = os.fork()
  if pid:
    return pid
  calls = 0
  def counted(function):
    def call(*args, **kwargs):
      nonlocal calls
      calls += 1
      if calls == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
      return function(*args, **kwargs)
    return call
  if kill_at:
    for name in ("fsync", "replace", "open", "mkdir"):
      setattr(os, name, counted(getattr(os, name)))
    Path.open = counted(Path.open)
    stages.to_line = counted(stages.to_line)
  run(out)
  os._exit(0)

base = Path(sys.argv[1])
run(base / "whole")
whole = contents(base / "whole")
kill_at, killed = 1, True
while killed:
  out = base / "killed"
  _, status = os.waitpid(child(out, kill_at), 0)
  killed = os.WIFSIGNALED(status)
  assert killed or status == 0
  if out.exists():
    check(out, whole)
    run(out)
    assert contents(out) == whole, kill_at
    shutil.rmtree(out)
  kill_at += 1
rng = random.Random(0)
for turn in range(4):
  out = base / "timed"
  finished, attempts = False, 0
  while not finished:
    attempts += 1
    pid = child(out, 0)
    time.sleep(rng.uniform(0, 0.01 * attempts))  # longer and longer: a slow machine gets there too
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    finished = status == 0
    assert finished or os.WIFSIGNALED(status)
    if out.exists():
      check(out, whole)
  assert contents(out) == whole
  shutil.rmtree(out)
print(kill_at - 2, "kills")
"""


def python(code, *arguments, wrap=()):
  command = [*wrap, sys.executable, "-c", code, *map(str, arguments)]
  environment = {**os.environ, "PYTHONPATH": str(REPO)}
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_stage_killed_at_any_point_ends_with_identical_bytes(tmp_path):
  result = python(KILLED, tmp_path)
  assert result.returncode == 0, result.stderr
  kills = int(result.stdout.split()[0])
  assert kills > 30  # every file opened, line written, file synced and renamed


# ---- full disk ----


def test_a_full_disk_is_said_and_finished_shards_stay(tmp_path, monkeypatch):
  """The third sync fails as a full disk does: stage.json and one shard's two files are through."""
  real, calls = os.fsync, []

  def full(handle):
    calls.append(handle)
    if len(calls) > 3:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(handle)

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(DataError, match="the disk is full.*finished shards are kept"):
    run(tmp_path)
  assert sorted(contents(tmp_path)) == [
    "rejected-00000-of-00003.jsonl",
    "shard-00000-of-00003.jsonl",
    "stage.json",
  ]
  monkeypatch.undo()
  assert run(tmp_path)["records"] == 8


REALLY_FULL = """
import sys
from pathlib import Path
from data_pipeline import stages
from data_pipeline.records import DataError

out = Path(sys.argv[1])
parts = [[1], [2], [3]]
def run(size):
  work = lambda number: {"image": str(number), "pad": "x" * size[number]}
  return stages.run_stage("full", parts, work, out, {}, progress=False)
try:
  run({1: 1000, 2: 200_000, 3: 10})
except DataError as error:
  print(error)
print(sorted(path.name for path in out.iterdir()))
print(run({2: 1000, 3: 10})["records"])
"""


def test_a_really_full_disk(tmp_path):
  """On a file system of 64 KiB, mounted for one process only where the system allows that."""
  wrap = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
  mount = f"mount -t tmpfs -o size=64k tmpfs {tmp_path}"
  try:
    allowed = subprocess.run([*wrap, mount], capture_output=True).returncode == 0
  except FileNotFoundError:
    allowed = False
  if not allowed:
    pytest.skip("cannot mount a small file system here")
  result = python(REALLY_FULL, tmp_path / "out", wrap=[*wrap, f'{mount} && exec "$@"', "sh"])
  assert result.returncode == 0, result.stderr
  error, files, records = result.stdout.splitlines()
  assert "the disk is full" in error
  assert files == "['rejected-00000-of-00003.jsonl', 'shard-00000-of-00003.jsonl', 'stage.json']"
  assert records == "3"


def test_two_processes_may_write_the_same_json(tmp_path, monkeypatch):
  """The file is one of theirs, whole."""
  path, replace = tmp_path / "a.json", os.replace

  def meanwhile(*names):
    other = f"from data_pipeline.stages import write_json\nwrite_json({str(path)!r}, 'other')"
    subprocess.run([sys.executable, "-c", other], check=True, timeout=60)
    replace(*names)

  monkeypatch.setattr(os, "replace", meanwhile)
  stages.write_json(path, "ours")
  assert json.loads(path.read_text()) == "ours" and len(contents(tmp_path)) == 1


def test_write_json_writes_all_or_nothing(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  stages.write_json(path, {"é": 1})
  assert path.read_text(encoding="utf-8") == '{\n "é": 1\n}\n'

  def refuse(*paths):
    raise OSError(errno.EDQUOT, "over quota")

  monkeypatch.setattr(os, "replace", refuse)
  with pytest.raises(DataError, match="a.json: the disk is full"):
    stages.write_json(path, {"b": 2})
  assert json.loads(path.read_bytes()) == {"é": 1} and len(contents(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(DataError, match="file"):
    run(tmp_path / "file" / "out")


# ---- reading ----


def test_reading_a_missing_unfinished_foreign_or_empty_folder_is_refused(tmp_path):
  with pytest.raises(DataError, match="nowhere: does not exist"):
    stages.read_records(tmp_path / "nowhere")
  with pytest.raises(DataError, match="is not a stage folder"):
    stages.read_records(tmp_path)
  run(tmp_path / "a")
  (tmp_path / "a" / "summary.json").unlink()
  (tmp_path / "a" / "shard-00002-of-00003.jsonl").unlink()
  with pytest.raises(DataError, match=r"'count' is unfinished \(2 of 3 shards\)"):
    stages.read_records(tmp_path / "a")
  stages.write_json(tmp_path / "a" / "stage.json", {"format": 9})
  with pytest.raises(DataError, match="has format 9"):
    stages.count_records(tmp_path / "a")
  run(tmp_path / "b", items=[4, 9])
  with pytest.raises(DataError, match=r"holds no records \(2 rejected\)"):
    stages.open_shards(tmp_path / "b")


def test_a_damaged_line_is_named_when_it_is_read(tmp_path):
  run(tmp_path)
  path = tmp_path / "shard-00001-of-00003.jsonl"
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(DataError, match="shard-00001-of-00003.jsonl:2"):
    list(stages.read_records(tmp_path))


def test_records_can_be_read_from_a_single_file(tmp_path):
  run(tmp_path)
  records = list(stages.read_records(tmp_path / "shard-00000-of-00003.jsonl"))
  assert [r.image_id for r in records] == [0, 1, 2]


def test_the_bar_shows_what_is_left(tmp_path, capsys):
  slow = stages.split_evenly(list(range(4)), 2)
  stages.run_stage("slow", slow, lambda n: time.sleep(0.01) or record(n), tmp_path, {})
  shown = capsys.readouterr().err
  assert "slow:" in shown and "4/4" in shown
