"""`lskd demo`: the whole road on drawn scenes, from pictures to a student that can be pointed.

Draws pictures, puts them into words that err at a known rate, writes statements, judges a few,
trains a critic, cuts, publishes, trains the arms, evaluates, reports. Because the scene graph is
known, every claim of the method is measured against the truth.

Each task (`demo_tasks.py`) runs in a process of its own, pinned to its cores, and those that fit on
one core run side by side. Whatever is killed continues when the demo is run again.
"""
import dataclasses
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

from data_pipeline.records import DataError
from data_pipeline.stages import write_json
from lskd_jax import demo_report, signals


@dataclasses.dataclass(frozen=True)
class Task:
  """name: of a task in demo_tasks. needs: tasks that must be done. cores: how many it can use."""
  name: str
  needs: tuple[str, ...]
  cores: int
  label: str


def evaluation(arm: str, trained_by: str = "") -> Task:
  """The task that evaluates an arm once it is trained."""
  return Task(f"evaluate-{arm}", (trained_by or arm,), 1, f"evaluate `{arm}`")


TASKS = (
    Task("pictures", (), 1, "draw, verbalize, teach, judge"),
    Task("words", ("pictures",), 2, "ViT on captions as bags of words (stage 0)"),
    Task("captions", ("words",), 1, "arm `pretrained`: Q-Former on captions (stage 1)"),
    Task("unfiltered", ("words",), 1, "arm `unfiltered`: all statements"),
    Task("heads_critic", ("captions",), 1, "critic with heads on the fused pass"),
    Task("score", ("unfiltered", "heads_critic"), 1, "critic on the student's likelihoods; the cut"),
    Task("publish", ("score",), 1, "TFDS dataset `lck`: build and publish"),
    Task("lskd", ("publish",), 1, "arm `lskd`: filtered, region tokens"),
    Task("none", ("publish",), 1, "arm `none`: filtered, regions hidden"),
    evaluation("pretrained", "captions"), evaluation("unfiltered"), evaluation("lskd"),
    evaluation("none"),
)
FULL = (
    Task("true", ("pictures",), 1, "true statements only"),
    Task("ceiling", ("true", "words"), 1, "arm `ceiling`: true statements only"),
    Task("overlay", ("publish",), 1, "arm `overlay`: filtered, boxes drawn"),
    evaluation("ceiling"), evaluation("overlay"),
)
# What others wait for starts first; evaluations fill the gaps.
URGENT = ("pictures", "words", "captions", "unfiltered", "heads_critic", "score", "publish", "overlay")

SIZES = dict(train=4500, dev=60, test=300, per_image=8, error_rate=0.25, judged=0.05, misjudged=0.05,
             steps=1.0, beta=0.5)
QUICK = dict(SIZES, train=240, dev=24, test=24, steps=0.02, judged=0.3)


def run(workdir: Path, quick: bool = False, full: bool = False, seed: int = 0, seeds: int = 1) -> None:
  """Runs or continues the demo and prints its results.

  Args:
    workdir: everything is written here; with several seeds, in a folder per seed.
    quick: one small run of everything; its numbers mean nothing.
    full: also the arms `overlay` and `ceiling`.
    seed, seeds: the first seed, and how many.

  Raises:
    DataError: the folder holds a demo of another kind, or a task failed (its log is named).
  """
  workdir = Path(workdir)
  folders = [workdir if seeds == 1 else workdir / f"seed-{seed + k}" for k in range(seeds)]
  for k, folder in enumerate(folders):
    if seeds > 1:
      print(f"seed {seed + k} ({k + 1} of {seeds})")
    run_seed(folder, dict(QUICK if quick else SIZES, seed=seed + k, full=full, quick=quick))
  results = demo_report.collect(folders)
  write_json(workdir / "results.json", results)
  demo_report.write(workdir / "report.html", folders, results)
  print(demo_report.table(results))
  print(f"\nreport: {workdir / 'report.html'}\nresults: {workdir / 'results.json'}")
  print(f"point the student yourself:\n  lskd score --model {folders[0] / 'runs/lskd/model'} "
        f"--image {folders[0] / 'test/images/scenes'}/{1000 * seed + 2}-000000.png "
        "--region 0,0,32,48 --text 'question: who is [0]? answer: a chef'")


def run_seed(work: Path, size: dict) -> None:
  """All tasks of one seed, as many side by side as there are cores."""
  claim(work, size)
  tasks = TASKS + (FULL if size["full"] else ())
  done = {task.name for task in tasks if (work / "tasks" / f"{task.name}.json").exists()}
  if done:
    print(f"continuing: {len(done)} of {len(tasks)} tasks were done")
  cores = available_cores()[:2]
  free = list(cores)
  running: dict[str, tuple] = {}
  spent = work / "seconds.json"
  before = json.loads(spent.read_text()) if spent.exists() else 0.0
  start = time.time()
  try:
    while len(done) < len(tasks):
      for task in in_order(tasks, done, running):
        wanted = min(task.cores, len(cores))
        if len(free) >= wanted:
          taken = [free.pop(0) for _ in range(wanted)]
          running[task.name] = (task, launch(task, work, taken, cores, size["quick"]), taken, time.time())
      for name, (task, process, taken, began) in list(running.items()):
        if process.poll() is None:
          continue
        del running[name]
        free = sorted(free + taken, key=cores.index)
        if process.returncode:
          raise DataError(f"demo task {name!r} ended with code {process.returncode}; see "
                          f"{work / 'tasks' / (name + '.log')}, and run the same command to go on")
        seconds = round(time.time() - began, 1)
        write_json(work / "tasks" / f"{name}.json", {"seconds": seconds})
        done.add(name)
        write_json(spent, round(before + time.time() - start, 1))  # a killed run loses little of it
        say(f"{len(done):2d}/{len(tasks)} {task.label:58s} {seconds:6.1f} s   "
            f"(total {time.time() - start:.0f} s)")
      time.sleep(0.05)
  finally:
    for _, process, _, _ in running.values():
      process.kill()


def in_order(tasks, done: set, running: dict) -> list[Task]:
  """Tasks that can start now, the most urgent first."""
  ready = [t for t in tasks
           if t.name not in done and t.name not in running and done.issuperset(t.needs)]
  rank = lambda task: (task.name not in URGENT, task.name.startswith("evaluate"))
  return sorted(ready, key=rank)


def claim(work: Path, size: dict) -> None:
  """Keeps what this folder's demo is; another kind of demo in the same folder is refused."""
  path = work / "demo.json"
  if path.exists():
    theirs = json.loads(path.read_text())
    # A plain demo can be continued as a full one: the same tasks and two more arms.
    if {**theirs, "full": True} != {**size, "full": True}:
      names = dict.fromkeys(("quick", "seed", *size, *theirs))  # what a user asked for comes first
      key = next(k for k in names if theirs.get(k) != size.get(k) and k != "full")
      raise DataError(f"{work} holds a demo with {key}={theirs.get(key)}, not {size.get(key)}; use another "
                      "--workdir, or the same options to continue it")
  (work / "tasks").mkdir(parents=True, exist_ok=True)
  write_json(path, size)


def available_cores() -> list[int]:
  """The cores this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def launch(task: Task, work: Path, cores: list[int], all_cores: list[int],
           quick: bool) -> subprocess.Popen:
  """Starts a task on its cores; it dies with this process."""
  terminal = sys.stderr.isatty()
  # A quick run compiles longer than it trains.
  flags = " --xla_backend_optimization_level=0" if quick else ""
  environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",  # side by side, and the same numbers on every machine of a kind
      "JAX_COMPILATION_CACHE_DIR": str((work / "compiled").absolute()),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
      "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + flags,
      "TQDM_POSITION": str(all_cores.index(cores[0])),
      "TQDM_MININTERVAL": "0.5" if terminal else "20",
  }
  command = [sys.executable, "-m", "lskd_jax.demo_tasks", task.name, str(work)]
  with (work / "tasks" / f"{task.name}.log").open("ab") as log:
    return subprocess.Popen(command, env=environment, stdout=log, stderr=None if terminal else log,
                            stdin=subprocess.DEVNULL, preexec_fn=lambda: tie(cores))


def tie(cores: list[int]) -> None:
  """In the child: run on these cores, and end when the parent ends."""
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, cores)
  signals.end_with_parent(signal.SIGKILL)


def say(line: str) -> None:
  """A line above the progress bars of the tasks that run."""
  print(("\r\033[K" if sys.stdout.isatty() else "") + line, flush=True)


