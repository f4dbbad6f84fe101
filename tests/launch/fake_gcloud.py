"""Stands in for `gcloud`: a cloud in a JSON file, which takes machines away and fails now and then.

$FAKE_CLOUD names the file:
  lives      one per queued resource: {"states": [...], "starts": [{"after": n, "exits": [[...], ...]}]}
             each look moves on one state, and the last one stays. A start's exits are what `cat` prints at
             successive looks, beginning `after` looks after the start; an entry is a list of codes.
             "error" is why its request failed; "idle" are the numbers of asked hosts that have no command
  failures   of commands, {"create 1": "why"}: the first `create` fails; "ERROR: …" is printed as it is
  commits    {"2": 40}: since the second start, checkpoint 40 is committed
  written    when the hosts last wrote to the bucket, such as 2027-01-15T08:00:00Z; without it, never
"""
import json
import os
from pathlib import Path
import sys


def answer(file: Path, words: list[str]) -> tuple[int, str, str]:
  """Exit code, output and errors of `gcloud` with these words."""
  cloud = json.loads(file.read_text())
  kind = verb(words)
  counts = cloud.setdefault("counts", {})
  counts[kind] = counts.get(kind, 0) + 1
  error = cloud.get("failures", {}).get(f"{kind} {counts[kind]}")
  out = ""
  if not error:
    try:
      out = globals()[kind](cloud, words)
    except LookupError as refused:
      error = refused.args[0]
  file.write_text(json.dumps(cloud))
  if error and not error.startswith("ERROR"):
    error = f"ERROR: (gcloud.{kind}) {error}"
  return (1, "", f"{error}\n") if error else (0, out, "")


def verb(words: list[str]) -> str:
  if "ssh" in words:
    command = next(word for word in words if word.startswith("--command="))
    return next(name for marks, name in (("lskd-setup.sh", "setup"), ("launch.preflight", "preflight"),
                                         ("launch.host start", "start"), ("launch.host stop", "stop"),
                                         ("launch.host ask", "ask"))
                if marks in command)
  return next(word for word in words if word in ("create", "describe", "delete", "cp", "cat", "ls", "rsync"))


def create(cloud, words):
  if cloud.get("life") is not None:
    raise LookupError("ALREADY_EXISTS: it is there")
  cloud["number"] = cloud.get("number", -1) + 1
  cloud["life"], cloud["looks"] = cloud["lives"][cloud["number"]], -1
  return ""


def describe(cloud, words):
  if cloud.get("life") is None:
    raise LookupError("NOT_FOUND: Resource was not found")
  if any("failedData" in word for word in words):
    return cloud["life"].get("error", "") + "\n"
  states = cloud["life"]["states"]
  cloud["looks"] = min(cloud["looks"] + 1, len(states) - 1)
  return states[cloud["looks"]] + "\n"


def delete(cloud, words):
  cloud["life"] = None
  return ""


def cp(cloud, words):
  cloud.setdefault("bucket", []).append(words[-1])
  return ""


def setup(cloud, words):
  assert any(url.rstrip("/") in " ".join(words) for url in cloud["bucket"]), "the code was not shipped"
  cloud["life"]["ready"] = True
  return ""


def preflight(cloud, words):
  assert cloud["life"]["ready"]
  return "worker 0: 4 chips\n"


def start(cloud, words):
  assert cloud["life"]["states"][cloud["looks"]] == "ACTIVE"
  cloud["begun"] = cloud.get("begun", 0) + 1
  cloud["start"], cloud["cats"] = cloud["life"]["starts"].pop(0), 0
  return "started\n"


def ask(cloud, words):
  idle = cloud["life"].get("idle") or [0]
  count = idle.pop(0) if len(idle) > 1 else idle[0]
  return "IDLE\n" * count + "RUNS\n" * (2 - count)


def stop(cloud, words):
  return ""


def cat(cloud, words):
  start = cloud["start"]
  cloud["cats"] += 1
  exits = start["exits"][:max(0, cloud["cats"] - start["after"])]
  if not exits:
    raise LookupError("The following URLs matched no objects or files")
  return "".join(json.dumps({"time": k, "code": code}) + "\n" for k, code in enumerate(exits[-1]))


def ls(cloud, words):
  if "--long" in words:
    if "written" not in cloud:
      raise LookupError("One or more URLs matched no objects.")
    return (f"      2048  {cloud['written']}  {words[-1].replace('*', 'log-0-0.txt')}\n"
            "TOTAL: 1 objects, 2048 bytes (2kiB)\n")
  step = cloud.get("commits", {}).get(str(cloud.get("begun", 0)))
  if step is None:
    raise LookupError("One or more URLs matched no objects.")
  return f"{words[-1].replace('*', str(step))}\n"


def rsync(cloud, words):
  if not cloud.get("begun"):
    raise LookupError(f"Did not find existing container at: {words[-2]}")
  folder = Path(words[-1]) / "20270115-080000" / "1"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "log-0-0.txt").write_text("step 1\nstep 2\n")
  (folder / "log-0-1.txt").write_text("step 1\n")
  return ""


if __name__ == "__main__":
  code, out, error = answer(Path(os.environ["FAKE_CLOUD"]), sys.argv[1:])
  sys.stdout.write(out)
  sys.stderr.write(error)
  sys.exit(code)
