"""A run is started again when its processes end for a reason that passes, and only then.

Small scripts stand in for `lskd train`: what the supervisor does does not depend on what it runs.
"""
import os
from pathlib import Path
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from lskd_jax import cli, exit_codes
from lskd_jax.supervisor import Budgets, Tally, decide, durable_step, newest_step, supervise

ROOT = Path(__file__).resolve().parents[2]
QUICK = Budgets(failures=2, preemptions=5, backoff=0.01)


# ---- the policy ----


@pytest.mark.parametrize("code", [42, 43, -9, -15, 134, 137, 143, 150, 151])
def test_what_a_restart_cures_is_restarted(code):
  assert decide([code, 0], 10, 10, Tally(), Budgets()).restart


@pytest.mark.parametrize("code", [1, 2, 3, 4, 41, 130])
def test_what_a_restart_does_not_cure_stops_with_its_code(code):
  decision = decide([0, code], 10, 20, Tally(), Budgets())
  assert (decision.restart, decision.code) == (False, code)


def test_a_run_whose_processes_all_end_with_0_is_done():
  assert decide([0, 0], 10, 20, Tally(), Budgets())[:2] == (False, exit_codes.DONE)


def test_the_process_that_ended_first_speaks_for_the_run():
  """The others lose their peer and end in whatever way; an error of theirs may be a consequence."""
  assert decide([-9, 1], None, None, Tally(), Budgets()).restart
  assert not decide([1, -6], None, None, Tally(), Budgets()).restart


@pytest.mark.parametrize("consequence", [exit_codes.PEER_LOST, -6])
def test_a_process_that_only_lost_another_does_not_speak_for_the_run(consequence):
  assert decide([consequence, 3], None, None, Tally(), Budgets())[:2] == (False, 3)
  assert decide([consequence, 0], None, None, Tally(), Budgets()).restart


def test_failures_count_in_a_row_and_a_newer_durable_step_forgives_them():
  tally = Tally()
  for failures in (1, 2):
    decision = decide([137], 10, 10, tally, QUICK)
    tally = decision.tally
    assert decision.restart and tally.failures == failures
  assert not decide([137], 10, 10, tally, QUICK).restart
  assert decide([137], 10, 11, tally, QUICK)[:3] == (True, 137, Tally(failures=1))


def test_preemptions_do_not_count_as_failures():
  decision = decide([42], 10, 10, Tally(failures=2), QUICK)
  assert decision.restart and decision.tally == Tally(failures=2, preemptions=1)
  assert not decide([42], 10, 20, Tally(preemptions=5), QUICK).restart


def test_each_failure_in_a_row_waits_twice_as_long_up_to_a_limit():
  delays = [decide([137], 1, 1, Tally(failures=n), Budgets(failures=99)).delay for n in (0, 1, 2, 50)]
  assert delays == [1, 2, 4, 64]


def test_the_durable_step_is_the_newest_with_a_marker(tmp_path, monkeypatch):
  assert durable_step(tmp_path) is None
  for step, name in ((9, "COMMITTED.json"), (40, "COMMITTED.json"), (60, "state")):
    folder = tmp_path / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / name).touch()
  assert durable_step(tmp_path) == 40
  monkeypatch.chdir(tmp_path)
  assert durable_step(".") == 40
  assert newest_step(["gs://b/run/checkpoints/7/COMMITTED.json", "gs://b/run/model/"]) == 7


# ---- real processes ----


def script(folder, body) -> list[str]:
  """A command that runs `body`, which knows its number `i`, the `turn` of its start, and `workdir`."""
  path = folder / "run.py"
  path.write_text(textwrap.dedent("""
      import os, pathlib, signal, sys, time
      words = sys.argv
      i, n = (int(words[words.index(name) + 1]) for name in ("--process-id", "--processes"))
      workdir = pathlib.Path(__file__).parent
      turns = workdir / f"turns-{i}"
      turn = len(turns.read_text()) if turns.exists() else 0
      turns.write_text("x" * (turn + 1))
      def commit(step):
        (workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
        (workdir / "checkpoints" / str(step) / "COMMITTED.json").touch()
      def kill(number=signal.SIGKILL):
        os.kill(os.getpid(), number)
      """) + textwrap.dedent(body))
  return [sys.executable, "-S", str(path)]


def turns(folder, i=0) -> int:
  return len((folder / f"turns-{i}").read_text())


def run(folder, body, processes=2, **options) -> int:
  return supervise(script(folder, body), processes, folder, **{"budgets": QUICK, "linger": 5.0, **options})


def test_a_killed_process_is_started_again_with_its_peers(tmp_path, capfd):
  code = run(tmp_path, """
      commit(40)
      if turn == 0 and i == 1:
        kill()
      if turn == 0:
        sys.exit(151)
      """)
  events = capfd.readouterr().err
  assert code == 0 and turns(tmp_path, 0) == turns(tmp_path, 1) == 2
  assert "process 1 ended with 137 (SIGKILL)" in events
  assert "restarting 1/2 from step 40" in events and "start 2: 2 processes" in events


def test_an_error_ends_the_run_at_once(tmp_path):
  assert run(tmp_path, "sys.exit(1 if i == 0 else 0)") == 1
  assert turns(tmp_path) == 1


def test_a_run_that_fails_without_progress_is_given_up(tmp_path):
  assert run(tmp_path, "sys.exit(150)", processes=1) == 150
  assert turns(tmp_path) == 1 + QUICK.failures


def test_a_run_that_fails_with_progress_goes_on(tmp_path):
  assert run(tmp_path, "commit(turn)\nsys.exit(150 if turn < 6 else 0)", processes=1) == 0
  assert turns(tmp_path) == 7


def test_a_preempted_run_is_resumed(tmp_path):
  assert run(tmp_path, "sys.exit((42, 43, 0)[turn])") == 0
  assert turns(tmp_path) == 3


def test_a_process_that_does_not_end_with_the_others_is_killed(tmp_path, capfd):
  code = run(tmp_path, """
      if i == 0 and turn == 0:
        while not (workdir / "deaf").exists():
          time.sleep(0.005)
        sys.exit(150)
      if i == 1 and turn == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (workdir / "deaf").touch()
        time.sleep(60)
      """, linger=0.15)
  events = capfd.readouterr().err
  assert code == 0
  assert "process 1 still there: SIGTERM" in events and "process 1 still there: SIGKILL" in events


def test_each_process_learns_its_number_the_coordinator_and_its_devices(tmp_path):
  run(tmp_path, """
      assert words[words.index("--coordinator") + 1].startswith("localhost:")
      print(i, n, os.environ["JAX_NUM_CPU_DEVICES"])
      """, processes=3, devices=4)
  logs = [(tmp_path / "logs" / f"process-{i}.log").read_text() for i in range(3)]
  assert logs == ["0 3 4\n", "1 3 4\n", "2 3 4\n"]


def test_process_0_is_seen_in_the_terminal_and_logs_are_continued(tmp_path, capfd):
  run(tmp_path, """
      print(f"result of {i} in turn {turn}")
      print("progress", file=sys.stderr)
      sys.exit(0 if turn else 42)
      """)
  shown = capfd.readouterr()
  assert shown.out == "result of 0 in turn 0\nresult of 0 in turn 1\n" and "progress" in shown.err
  assert "result of 1 in turn 0\n" in (tmp_path / "logs" / "process-1.log").read_text()
  assert "result of 0 in turn 1" in (tmp_path / "logs" / "process-0.log").read_text()
  assert "restarting 1/5" in (tmp_path / "logs" / "supervisor.log").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that takes nothing")
def test_logs_on_a_full_disk_do_not_end_a_run(tmp_path, capfd):
  (tmp_path / "logs").mkdir()
  for name in ("process-0", "supervisor"):
    (tmp_path / "logs" / f"{name}.log").symlink_to("/dev/full")
  assert run(tmp_path, "if i == 0:\n  print('a result')") == 0
  shown = capfd.readouterr()
  assert shown.out == "a result\n" and "supervisor: done" in shown.err


SAVES = """
    def save(*_):
      commit(turn)
      sys.exit(42)
    signal.signal(signal.SIGTERM, save)
    (workdir / f"ready-{i}").touch()
    time.sleep(60)
    """


@pytest.fixture
def supervisor(tmp_path):
  """Starts a supervisor of two processes in a process of its own, and returns it when they are ready."""
  def start(body, before="pass"):
    command = script(tmp_path, body)
    code = (f"{before}\nimport sys; from lskd_jax.supervisor import *; "
            f"sys.exit(supervise({command!r}, 2, {str(tmp_path)!r}, linger=5.0))")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    started.append(process)
    wait_for(lambda: all((tmp_path / f"ready-{i}").exists() for i in (0, 1)))
    return process
  started = []
  yield start
  for process in started:
    process.kill()
    process.wait()
    process.stderr.close()


def wait_for(happened, seconds=30):
  end = time.monotonic() + seconds
  while not happened():
    assert time.monotonic() < end, "it did not happen"
    time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_all_processes_save_and_is_not_answered_by_a_restart(supervisor, tmp_path, number):
  process = supervisor(SAVES)
  process.send_signal(number)
  _, events = process.communicate(timeout=30)
  assert process.returncode == 42 and durable_step(tmp_path) == 0
  assert turns(tmp_path, 0) == turns(tmp_path, 1) == 1
  assert f"stopped by {number.name}: ends with 42 (preempted, saved)" in events


def test_a_closed_terminal_lets_all_processes_save(supervisor, tmp_path):
  """Nobody reads standard error any more, and SIGHUP comes."""
  process = supervisor(SAVES)
  process.stderr.close()
  process.send_signal(signal.SIGHUP)
  assert process.wait(timeout=30) == 42 and durable_step(tmp_path) == 0


def test_a_terminal_that_stands_still_changes_nothing_else(supervisor, tmp_path):
  """Under Ctrl-S or a pager: more is said than a pipe holds, nobody reads, and the log has it."""
  process = supervisor("""
      for _ in range(150 if i == 0 else 0):
        sys.stderr.write("." * 999 + chr(10))
      """ + textwrap.indent(textwrap.dedent(SAVES), " " * 6))
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 42 and durable_step(tmp_path) == 0
  assert (tmp_path / "logs" / "process-0.log").stat().st_size == 150_000


LINGERS = SAVES.replace("sys.exit(42)", """(workdir / "heard").touch()
      while not (workdir / "end").exists():
        time.sleep(0.01)
      sys.exit(42)""")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_kills(supervisor, tmp_path, first):
  process = supervisor(LINGERS)
  process.send_signal(first)
  wait_for((tmp_path / "heard").exists)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 137


def test_a_terminal_that_closes_sends_two_signals_which_are_one_notice(supervisor, tmp_path):
  """Of its shell and of the kernel."""
  process = supervisor(LINGERS)
  process.send_signal(signal.SIGHUP)
  wait_for((tmp_path / "heard").exists)
  process.send_signal(signal.SIGHUP)
  time.sleep(0.2)  # longer than it takes to kill
  (tmp_path / "end").touch()
  process.communicate(timeout=30)
  assert process.returncode == 42


def test_a_second_signal_kills_also_while_the_first_is_passed_on(supervisor):
  process = supervisor(LINGERS, before=textwrap.dedent("""
      import os, signal, subprocess
      send = subprocess.Popen.send_signal
      def send_and_get_another(child, number):
        send(child, number)
        os.kill(os.getpid(), signal.SIGTERM)
      subprocess.Popen.send_signal = send_and_get_another
      """))
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 137


def test_questions_are_passed_on_and_end_nothing(supervisor, tmp_path):
  """SIGUSR1 asks all processes for their stacks, SIGUSR2 one for a profile."""
  process = supervisor("""
      for number in (signal.SIGUSR1, signal.SIGUSR2):
        assert signal.getsignal(number) == signal.SIG_IGN  # as long as there is no answer
        signal.signal(number, lambda number, frame: (workdir / f"asked-{i}-{number}").touch())
      """ + textwrap.indent(textwrap.dedent(SAVES), " " * 6))
  asked = lambda number, i: (tmp_path / f"asked-{i}-{number}").exists()
  process.send_signal(signal.SIGUSR2)
  wait_for(lambda: asked(signal.SIGUSR2, 0))
  process.send_signal(signal.SIGUSR1)
  wait_for(lambda: asked(signal.SIGUSR1, 0) and asked(signal.SIGUSR1, 1))
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 42 and not asked(signal.SIGUSR2, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells processes of their parent's end")
def test_processes_save_and_end_when_the_supervisor_is_killed(supervisor, tmp_path):
  process = supervisor(SAVES)
  process.kill()
  process.wait(timeout=30)
  wait_for(lambda: durable_step(tmp_path) == 0)


# ---- the command ----


@pytest.fixture
def supervised(monkeypatch):
  """What `lskd train --local-processes` hands to the supervisor: (command, processes, devices)."""
  calls = []

  def stand_in(command, processes, workdir, devices):
    calls.append((command[3:], processes, devices))
    return 42
  monkeypatch.setattr("lskd_jax.supervisor.supervise", stand_in)

  def start(*words):
    with pytest.raises(SystemExit) as ended:
      cli.main(["train", "--config", "configs/forkme.py", "--workdir", "out", *words])
    assert ended.value.code == 42
    return calls[-1]
  return start


@pytest.mark.parametrize("words,processes,devices", [
    (["--config.train.mesh.fsdp=4", "--local-processes", "2"], 2, 2),
    (["--config.train.mesh.data=-1", "--config.train.mesh.fsdp=2", "--local-processes=4"], 4, 1),
    (["--config.train.mesh.fsdp=4", "--local-processes=2", "--devices-per-process", "3"], 2, 3),
    (["--local-processes", "1"], 1, 1)])
def test_the_same_command_runs_in_each_process_with_the_devices_that_the_mesh_needs(
    supervised, words, processes, devices):
  command, *how = supervised(*words)
  kept = [word for word in words if word.startswith("--config.")]
  assert command == ["train", "--config", "configs/forkme.py", "--workdir", "out", *kept]
  assert how == [processes, devices]


def test_a_mesh_that_does_not_fit_the_processes_is_refused(capsys):
  words = ["train", "--config", "configs/forkme.py", "--workdir", "out", "--local-processes", "3",
           *(f"--config.train.mesh.{axis}" for axis in ("slice=1", "data=1", "fsdp=2"))]
  assert cli.main(words) == 1
  assert capsys.readouterr().err == (
      "lskd: error: train.mesh needs 2 devices, which cannot be spread over 3 processes: "
      "try --config.train.mesh.data=3\n")


def test_it_is_quick_to_start_because_it_does_not_import_jax():
  code = "import sys, lskd_jax.supervisor; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, check=False).returncode == 0
