"""What runs on the hosts, with real processes on this one."""
import errno
import fcntl
import http.server
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time

import pytest

from launch import host, preflight
from launch.preflight import Facts, problems


@pytest.fixture
def metadata(monkeypatch):
  """Attributes that a metadata server has, and as "errors" the codes that it answers with before."""
  class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      value = known.get(self.path.rpartition("/")[2])
      self.send_response(known["errors"].pop() if known["errors"] else 200 if value else 404)
      self.end_headers()
      self.wfile.write((value or "").encode())

    def log_message(self, *unused):
      pass
  known = {"errors": []}
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(host, "METADATA_PAUSES", (0.0,) * 3)
    yield known
    server.shutdown()


@pytest.fixture
def start(tmp_path, metadata):
  """Starts a script as the command of this host; the folder on its disk and the one in the bucket."""
  folder, run = tmp_path / "host", tmp_path / "bucket" / "run" / "1"

  def begin(script):
    host.start(folder, run, 0, [sys.executable, "-S", "-c", script])
    return folder, run
  yield begin
  host.stop(folder, grace=0.1)


def ended(run, name="0-0", seconds=30):
  """What the exit file says, once it is there."""
  end = time.monotonic() + seconds
  while not (run / f"exit-{name}.json").exists():
    assert time.monotonic() < end, "the command did not end"
    time.sleep(0.01)
  return json.loads((run / f"exit-{name}.json").read_text())


def test_a_command_outlives_its_starter_and_tells_how_it_ended(start):
  folder, run = start("print('step 1', flush=True); raise SystemExit(42)")
  assert ended(run)["code"] == 42
  assert (run / "log-0-0.txt").read_text() == "step 1\n"


def test_starting_the_same_run_twice_starts_it_once(start, tmp_path, capsys):
  script = f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); import time; time.sleep(60)"
  start(script)
  start(script)
  assert "runs already" in capsys.readouterr().out
  while not ((tmp_path / "starts").exists() and (tmp_path / "starts").read_text()):
    time.sleep(0.01)
  assert (tmp_path / "starts").read_text() == "x"


def test_another_run_is_not_started_beside_it(start, tmp_path):
  folder, _ = start("import time; time.sleep(60)")
  with pytest.raises(SystemExit, match="another run is still there"):
    host.start(folder, tmp_path / "other", 0, ["true"])


# The scripts below do not `open`: Python loses what a signal raises while a file is being closed.


def test_a_stopped_command_may_save_first(start, tmp_path):
  ready = tmp_path / "ready"
  folder, run = start("import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(42));"
                      f"os.mkdir({str(ready)!r}); time.sleep(60)")
  while not ready.exists():
    time.sleep(0.01)
  host.stop(folder, grace=30.0)
  assert ended(run)["code"] == 42 and not host.is_running(folder)


def test_a_command_that_does_not_listen_is_killed(start, tmp_path):
  ready = tmp_path / "ready"
  folder, run = start("import os, signal, time; signal.signal(15, signal.SIG_IGN);"
                      f"os.mkdir({str(ready)!r}); time.sleep(60)")
  while not ready.exists():
    time.sleep(0.01)
  host.stop(folder, grace=0.1)
  assert ended(run)["code"] == -signal.SIGKILL


def test_a_sigterm_to_the_attendant_is_passed_on(start, tmp_path):
  """A machine that shuts down ends all processes; the exit code must be written down all the same."""
  ready = tmp_path / "ready"
  folder, run = start("import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(42));"
                      f"os.mkdir({str(ready)!r}); time.sleep(60)")
  while not ready.exists():
    time.sleep(0.01)
  os.kill(host.pids(folder)[0], signal.SIGTERM)
  assert ended(run)["code"] == 42


def test_a_command_that_does_not_exist_ends_with_127(tmp_path, metadata):
  host.main(["start", "--folder", str(tmp_path / "host"), "--run", str(tmp_path / "run"), "--", "no-such"])
  assert ended(tmp_path / "run")["code"] == 127


def test_an_exit_code_is_written_once_the_bucket_is_back(start, tmp_path):
  go = tmp_path / "go"
  folder, run = start(f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
                      "print('last words'); raise SystemExit(42)")
  run.rmdir()
  go.touch()
  while "trying again" not in (folder / "attendant.log").read_text():
    time.sleep(0.01)
  assert host.is_running(folder), "nobody else may start beside it"
  run.mkdir()
  assert ended(run)["code"] == 42
  assert (run / "log-0-0.txt").read_text() == "last words\n"


def test_a_host_tells_whether_its_command_is_there(start, capsys):
  folder, _ = start("import time; time.sleep(60)")
  host.main(["ask", "--folder", str(folder)])
  assert capsys.readouterr().out.endswith("RUNS\n")
  host.stop(folder, grace=0.1)
  host.main(["ask", "--folder", str(folder)])
  assert capsys.readouterr().out == "IDLE\n"


def test_the_log_of_a_start_is_its_own(start, tmp_path):
  folder, run = start("print('first')")
  ended(run)
  while host.is_running(folder):
    time.sleep(0.01)
  again = run.with_name("2")
  host.start(folder, again, 0, [sys.executable, "-S", "-c", "print('second')"])
  ended(again)
  assert (again / "log-0-0.txt").read_text() == "second\n"


def test_a_metadata_server_that_is_busy_is_asked_again(start, metadata):
  metadata |= {"agent-worker-number": "3", "errors": [503, 503]}
  _, run = start("pass")
  assert ended(run, "0-3")["code"] == 0


def test_a_host_that_cannot_learn_its_number_does_not_pass_for_worker_0(start, metadata, tmp_path):
  metadata["errors"] = [503] * 9
  with pytest.raises(SystemExit, match="ERROR: the metadata server .* does not answer: HTTP Error 503"):
    start("pass")
  assert not host.is_running(tmp_path / "host")


# ---- preflight ----

GOOD = Facts(chips=4, worker=3, hosts=4, environment={}, free_gb=50.0, python=(3, 12), bucket=None)


def test_a_good_host_has_no_problems():
  assert problems(GOOD, chips=4, hosts=4, slices=1, disk_gb=20) == []
  alone = GOOD._replace(worker=None, hosts=None)
  assert problems(alone, chips=4, hosts=1, slices=1, disk_gb=20) == []


@pytest.mark.parametrize("change,said", [
    ({"chips": 0}, "0 chips are there, 4 are expected"),
    ({"hosts": 2}, "the slice has 2 hosts, 4 are expected"),
    ({"hosts": None}, "the metadata server does not say how many hosts there are and which one this is"),
    ({"worker": None}, "the metadata server does not say how many hosts there are and which one this is"),
    ({"environment": {"MEGASCALE_NUM_SLICES": "3"}}, "MEGASCALE_NUM_SLICES is 3, 1 are expected"),
    ({"environment": {"TPU_WORKER_HOSTNAMES": "a,b"}}, "TPU_WORKER_HOSTNAMES names 2 hosts, 4 are expected"),
    ({"free_gb": 3.2}, "3 GB of disk are free, 20 are needed"),
    ({"python": (3, 10)}, "Python 3.10 is too old, 3.11 is needed"),
    ({"bucket": "the bucket is not mounted"}, "the bucket is not mounted")])
def test_what_would_keep_a_run_from_starting_is_named(change, said):
  assert problems(GOOD._replace(**change), chips=4, hosts=4, slices=1, disk_gb=20) == [said]


def test_the_metadata_say_which_host_this_is(tmp_path, metadata):
  assert preflight.gather(tmp_path)[1:3] == (None, None)
  metadata |= {"agent-worker-number": "3", "worker-network-endpoints": "a:b:c,d:e:f"}
  assert preflight.gather(tmp_path)[1:3] == (3, 2)


def test_a_plain_folder_is_not_the_mounted_bucket(tmp_path, metadata):
  assert preflight.gather(tmp_path).bucket == "the bucket is not mounted"


def test_a_bucket_in_which_folders_can_be_renamed_is_good_and_left_clean(tmp_path, monkeypatch):
  monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
  assert preflight.wrong_with_bucket(tmp_path) is None
  assert list(tmp_path.iterdir()) == []


def test_a_bucket_in_which_no_checkpoint_gets_its_name_is_refused(tmp_path, monkeypatch):
  """Cloud Storage FUSE renames by default only folders that have nothing in them."""
  def rename(before, after):
    if os.path.isdir(before) and os.listdir(before):
      raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), before)
    real(before, after)
  real = os.rename
  monkeypatch.setattr(os, "rename", rename)
  monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
  assert preflight.wrong_with_bucket(tmp_path) == (
      "a folder in the bucket cannot be written and renamed (Too many open files), so that no checkpoint "
      "would be saved: mount it as launch/setup.sh does, with the right to write")
  assert list(tmp_path.iterdir()) == []


def test_a_lock_that_nobody_holds_is_removed(tmp_path):
  lock = tmp_path / "libtpu_lockfile"
  lock.touch()
  assert preflight.free_the_chips(tmp_path / "host", lock) is None
  assert not lock.exists()


def test_our_own_earlier_run_is_ended_with_its_lock(start, tmp_path):
  lock = tmp_path / "libtpu_lockfile"
  folder, run = start(f"import time; held = open({str(lock)!r}, 'w'); time.sleep(60)")
  while not lock.exists():
    time.sleep(0.01)
  assert preflight.free_the_chips(folder, lock) is None
  assert ended(run)["code"] == -signal.SIGTERM and not lock.exists()


def test_somebody_elses_process_is_named_and_not_touched(tmp_path):
  lock = tmp_path / "libtpu_lockfile"
  script = f"import time; held = open({str(lock)!r}, 'w'); time.sleep(60)"
  other = subprocess.Popen([sys.executable, "-S", "-c", script])
  try:
    while not lock.exists():
      time.sleep(0.01)
    assert f"process {other.pid} uses the chips" in preflight.free_the_chips(tmp_path / "host", lock)
    assert other.poll() is None and lock.exists()
  finally:
    other.kill()
    other.wait()


def test_another_users_lock_is_left_and_named(tmp_path, monkeypatch):
  """In /tmp, which is sticky, nobody else can remove it, and that user's processes cannot be looked into."""
  def unlink(path, missing_ok=False):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
  monkeypatch.setattr(Path, "unlink", unlink)
  lock = tmp_path / "libtpu_lockfile"
  lock.touch()
  assert preflight.free_the_chips(tmp_path / "host", lock) == (
      f"{lock} is of another user (uid {os.getuid()}): end that user's work on the chips, then "
      f"`sudo rm {lock}`")


def test_a_number_in_a_file_is_no_sign_of_life(tmp_path):
  """Only the lock is: the process of that number may be another one by now."""
  (tmp_path / "pids").write_text(f"{os.getpid()} {os.getpid()}")
  (tmp_path / "lock").touch()
  assert not host.is_running(tmp_path)
  with (tmp_path / "lock").open() as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert host.is_running(tmp_path)
