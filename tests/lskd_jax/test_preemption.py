"""How the processes of a run agree where to stop: threads are processes, a dictionary is the service."""
import ctypes
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lskd_jax import preemption, signals
from lskd_jax.exit_codes import PEER_LOST, PREEMPTED, PREEMPTED_SAVED
from lskd_jax.peers import LocalStore
from lskd_jax.preemption import Preemption

LONG = 20  # seconds: far more than anything here takes


class Ended:
  """Stands in for `peers.leave`: keeps the exit code."""

  def __init__(self):
    self.code, self.event = None, threading.Event()

  def __call__(self, code):
    self.code = code
    self.event.set()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(preemption, "LOOK_EVERY", 0.01)


@pytest.fixture
def processes(tmp_path):
  """Makes the `Preemption`s of n processes that share a store: [(Preemption, Ended)]."""
  made = []

  def make(count, grace=LONG):
    texts = {}
    for i in range(count):
      ended = Ended()
      stop = Preemption(leave=ended)
      stop.connect(tmp_path, grace, LocalStore(i, count, texts))
      made.append((stop, ended))
    return made
  yield make
  for stop, _ in made:
    stop.close()


def until(condition):
  end = time.monotonic() + LONG
  while not condition():
    assert time.monotonic() < end, "it never came"
    time.sleep(0.005)


def loop(stop, begin, found, limit=10**6):
  """A training loop that is ready, in which each step takes a moment; notes (what, where) it is told."""
  for step in range(begin, limit):
    due = stop.at_boundary(step)
    if due:
      found.append((due, step))
    if due == "stop":
      return
    time.sleep(0.002)


def run_loops(stops, begins, meanwhile):
  found = [[] for _ in stops]
  threads = [threading.Thread(target=loop, args=(stop, begin, notes), daemon=True)
             for (stop, _), begin, notes in zip(stops, begins, found)]
  for (stop, _), begin, thread in zip(stops, begins, threads):
    stop.ready(begin)
    thread.start()
  meanwhile()
  for thread in threads:
    thread.join(LONG)
    assert not thread.is_alive()
  return found


def test_a_process_alone_stops_at_the_next_boundary(processes):
  ((stop, _),) = processes(1)
  stop.ready(7)
  stop.ask("stop", "SIGTERM")
  until(lambda: stop.stopping)
  assert stop.at_boundary(7) == "stop"


def test_all_stop_at_the_largest_boundary_that_any_of_them_has_not_passed(processes):
  """The slowest loop goes on up to where the fastest is already."""
  (slow, _), (fast, _), (middle, _) = processes(3)
  for stop, position in ((slow, 4), (fast, 6), (middle, 5)):
    stop.ready(position)
  middle.ask("stop", "SIGTERM")
  until(lambda: slow.stopping and fast.stopping and middle.stopping)
  assert [slow.at_boundary(step) for step in (4, 5, 6)] == [None, None, "stop"]
  assert [middle.at_boundary(step) for step in (5, 6)] == [None, "stop"]
  assert fast.at_boundary(6) == "stop"


def test_running_loops_agree_whoever_is_told(processes):
  stops = processes(3)
  found = run_loops(stops, [3, 3, 3], lambda: stops[1][0].ask("stop", "SIGTERM"))
  assert found[0] == found[1] == found[2]
  assert [due for due, _ in found[0]] == ["stop"]


def test_being_told_twice_or_by_two_changes_nothing(processes):
  stops = processes(2)

  def tell():
    for stop, _ in stops * 2:
      stop.ask("stop", "SIGTERM")
  first, second = run_loops(stops, [1, 1], tell)
  assert first == second and len(first) == 1


def test_saves_asked_for_by_the_clock_meet_all_processes_and_training_goes_on(processes):
  stops = processes(2)

  def tell():
    for number in (1, 2):
      stops[0][0].ask("save", "train.save_minutes")
      until(lambda: all(stop._saves == number for stop, _ in stops))
    stops[1][0].ask("stop", "SIGTERM")
  first, second = run_loops(stops, [1, 1], tell)
  assert first == second
  assert [due for due, _ in first] == ["save", "save", "stop"]


def test_a_save_waits_until_all_processes_have_something_to_save(processes):
  (early, _), (late, _) = processes(2)
  early.ready(1)
  early.ask("save", "train.save_minutes")
  time.sleep(0.1)  # many looks
  late.ready(1)
  until(lambda: early._save.boundary is not None and late._save.boundary is not None)
  assert early.at_boundary(1) == late.at_boundary(1) == "save"


def test_if_one_process_has_nothing_to_save_all_end_at_once(processes):
  (compiling, first), (training, second) = processes(2)
  training.ready(1)
  training.ask("stop", "SIGTERM")
  for ended in (first, second):
    assert ended.event.wait(LONG)
    assert ended.code == PREEMPTED


def test_a_save_that_takes_longer_than_the_grace_is_given_up(processes):
  ((stop, ended),) = processes(1, grace=0.05)
  stop.ready(1)
  stop.ask("stop", "SIGTERM")
  assert ended.event.wait(LONG)
  assert ended.code == PREEMPTED


@pytest.mark.parametrize("kind,code", [("stop", PREEMPTED), ("save", PEER_LOST)])
def test_a_process_that_says_nothing_is_not_waited_for(tmp_path, monkeypatch, kind, code):
  monkeypatch.setattr(preemption, "AGREE_WITHIN", 0.05)
  ended = Ended()
  stop = Preemption(leave=ended)
  stop.connect(tmp_path, LONG, LocalStore(0, 2))
  stop.ready(1)
  stop.ask(kind, "a test")
  assert ended.event.wait(LONG)
  assert ended.code == code


def test_if_process_0_is_gone_the_others_end(tmp_path):
  class Gone(LocalStore):
    def list(self, folder):
      raise RuntimeError("UNAVAILABLE: failed to connect")
  ended = Ended()
  stop = Preemption(leave=ended)
  stop.connect(tmp_path, LONG, Gone(1, 2))
  assert ended.event.wait(LONG)
  assert ended.code == PEER_LOST
  assert "cannot be reached" in (tmp_path / "crash-1.json").read_text()


@pytest.mark.parametrize("said", [RuntimeError(), TimeoutError()])
def test_an_error_without_words_is_one_too(tmp_path, said):
  class Gone(LocalStore):
    def list(self, folder):
      raise said
  ended = Ended()
  stop = Preemption(leave=ended)
  stop.connect(tmp_path, LONG, Gone(1, 2))
  assert ended.event.wait(LONG)
  assert f"({type(said).__name__})" in (tmp_path / "crash-1.json").read_text()


def test_a_process_that_is_told_to_stop_ends_in_time_though_process_0_does_not_answer(tmp_path, term):
  """It stands still, or is cut off: a call to its store returns only when the connection is given up."""
  class Silent(LocalStore):
    def list(self, folder):
      asked.set()
      threading.Event().wait(LONG)
  asked, ended = threading.Event(), Ended()
  stop = Preemption(term, leave=ended)
  stop.connect(tmp_path, 0.05, Silent(1, 2))
  stop.ready(1)
  assert asked.wait(LONG)
  os.kill(os.getpid(), signal.SIGTERM)
  assert ended.event.wait(LONG / 2)
  assert ended.code == PREEMPTED


# --- SIGTERM --------------------------------------------------------------------------------------


@pytest.fixture
def term():
  """SIGTERM in our hands; the test's process keeps its own handler."""
  term = signals.Term()
  yield term
  term.close()


def test_sigterm_is_noticed_by_a_thread_while_the_main_thread_cannot_run_handlers(term):
  """As in a compile: the thread reads it from the pipe before any Python handler runs."""
  found = []
  watcher = threading.Thread(target=lambda: found.append(term.wait(LONG)))
  watcher.start()
  killer = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM))
  killer.start()
  hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # a second or two in C
  assert found == ["SIGTERM"]
  assert term.wait(0) == "SIGTERM"  # and stays so


def test_nothing_is_said_while_the_handler_is_ours(term):
  assert term.keep() is None
  assert not term.wait(0)


def test_a_python_handler_installed_later_is_named_and_replaced(term):
  signal.signal(signal.SIGTERM, subprocess.list2cmdline)
  assert term.keep() == "Python code in subprocess replaced the handler of SIGTERM"
  assert term.keep() is None
  os.kill(os.getpid(), signal.SIGTERM)
  assert term.wait(LONG)


def test_a_handler_installed_by_c_code_is_named_and_replaced(term):
  """Python's own table does not show it."""
  libc = ctypes.CDLL("libc.so.6")
  libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
  libc.signal(signal.SIGTERM, ctypes.cast(libc.abs, ctypes.c_void_p))
  assert term.keep() == "a C library (libc.so.6) replaced the handler of SIGTERM"
  assert term.keep() is None


def test_a_replaced_handler_is_warned_about_once(term, capsys):
  stop = Preemption(term)
  for _ in range(3):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stop.keep_handler()
  stop.close()
  assert capsys.readouterr().err.count("replaced the handler of SIGTERM") == 1


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_ends_a_run_unless_nohup_has_its_signal_ignored(ignored):
  script = ("import os, signal, time\nfrom lskd_jax import preemption\n"
            f"signal.signal(signal.SIGHUP, signal.SIG_{'IGN' if ignored else 'DFL'})\n"
            "preemption.install()\nos.kill(os.getpid(), signal.SIGHUP)\n"
            f"time.sleep({0.5 if ignored else 60})")
  child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
  assert child.returncode == (0 if ignored else PREEMPTED)
  assert ("SIGHUP: there is nothing to save yet" in child.stderr) != ignored


def test_sigterm_before_training_ends_with_43_also_when_it_comes_twice(tmp_path):
  """Nothing is there to be saved, and nothing waits."""
  script = ("import time\nfrom lskd_jax import preemption\npreemption.install()\n"
            "print('ready', flush=True)\ntime.sleep(60)")
  child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)
  try:
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
  finally:
    child.kill()
  assert child.returncode == PREEMPTED
  assert "SIGTERM: there is nothing to save yet" in said


GONE = "read, write = os.pipe()\nos.dup2(write, 2)\nos.close(read)\n"
STILL = ("read, write = os.pipe()\nos.dup2(write, 2)\nos.set_blocking(2, False)\n"
         "try:\n  while True: os.write(2, b'#')\nexcept BlockingIOError: os.set_blocking(2, True)\n")


@pytest.mark.parametrize("standard_error", [GONE, STILL], ids=["gone", "still"])
def test_a_standard_error_that_nobody_reads_does_not_keep_a_run_from_saving(tmp_path, standard_error):
  """As after a lost connection, or under Ctrl-S: the pipe is broken or full when the processes agree."""
  script = (f"import os, signal, sys, time\nfrom lskd_jax import preemption\n{standard_error}"
            f"stop = preemption.install()\nstop.connect({str(tmp_path)!r}, 25)\nstop.ready(1)\n"
            "os.kill(os.getpid(), signal.SIGTERM)\nstep = 1\n"
            "while stop.at_boundary(step) != 'stop':\n  step += 1\n  time.sleep(0.01)\n"
            "raise preemption.Preempted")
  assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == PREEMPTED_SAVED


def test_a_loop_that_waits_for_a_terminal_ends_when_its_grace_is_over(tmp_path):
  """As a progress bar under Ctrl-S does."""
  script = (f"import os, signal, sys\nfrom lskd_jax import preemption\n{STILL}"
            f"stop = preemption.install()\nstop.connect({str(tmp_path)!r}, 0.5)\nstop.ready(1)\n"
            "os.kill(os.getpid(), signal.SIGTERM)\nsys.stderr.write('100%|######|')\nsys.stderr.flush()\n")
  assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == PREEMPTED


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_question_to_a_process_that_is_not_in_its_loop_does_not_end_it(number):
  """SIGUSR1 asks for stacks, SIGUSR2 for a profile, of steps that there are not yet."""
  script = ("import os\nfrom lskd_jax import preemption\npreemption.install()\n"
            f"def waiting_here():\n  os.kill(os.getpid(), {number})\nwaiting_here()\nprint('done')")
  child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
  assert (child.returncode, child.stdout) == (0, "done\n")
  assert ("in waiting_here" in child.stderr) == (number == signal.SIGUSR1)


def test_the_exit_code_of_a_saved_preemption_is_42():
  assert preemption.Preempted().code == PREEMPTED_SAVED


def test_a_second_sigterm_changes_nothing_after_the_loop_either(tmp_path):
  """Python takes seconds to end."""
  script = ("import atexit, os, signal\nfrom lskd_jax import preemption\n"
            "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
            f"stop = preemption.install()\nstop.connect({str(tmp_path)!r}, 25)\nstop.ready(1)\n"
            "os.kill(os.getpid(), signal.SIGTERM)\nstop.wait_until_told()\n"
            "assert stop.at_boundary(1) == 'stop'\nstop.close()\nraise preemption.Preempted")
  assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == PREEMPTED_SAVED


def test_the_signals_of_a_forked_process_are_its_own():
  """As of a pool that an evaluation makes. In a process of its own: one with JAX should not fork."""
  script = ("import multiprocessing, time\nfrom lskd_jax import signals\n"
            "term, fork = signals.Term(), multiprocessing.get_context('fork')\n"
            "ready = fork.Event()\nchild = fork.Process(target=lambda: (ready.set(), time.sleep(60)))\n"
            "child.start()\nready.wait()\nchild.terminate()\nchild.join()\n"
            "print(child.exitcode, term.wait(0.1))")
  child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
  assert child.stdout == f"{-signal.SIGTERM} None\n", child.stderr


# --- Google's metadata server ---------------------------------------------------------------------


@pytest.fixture
def metadata_server(monkeypatch):
  """Starts a server that gives these answers, byte by byte; returns the list of what it was asked."""
  servers = []

  def start(*answers):
    left, asked = iter(answers), []

    class Server(http.server.BaseHTTPRequestHandler):
      def do_GET(self):
        asked.append((self.path, self.headers["Metadata-Flavor"]))
        self.wfile.write(next(left))

      def log_message(self, *unused):
        pass
    server = http.server.HTTPServer(("localhost", 0), Server)
    servers.append(server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
    return asked
  yield start
  for server in servers:
    server.shutdown()
    server.server_close()


FALSE, TRUE = (b"HTTP/1.0 200 OK\r\n\r\n" + flag for flag in (b"FALSE", b"TRUE"))
BUSY = b"HTTP/1.0 503 Service Unavailable\r\n\r\n"


@pytest.mark.parametrize("answers", [
    (FALSE, FALSE, TRUE), (BUSY, BUSY, BUSY, BUSY, TRUE), (b"", b"?", TRUE),
    (FALSE, b"", b"?", b"", b"?", TRUE)])
def test_the_preempted_flag_of_the_metadata_server_is_a_notice(metadata_server, answers):
  """Also of one that is busy at first, and of one that says nothing or nonsense in between."""
  asked, reasons = metadata_server(*answers), []
  signals.watch_metadata(reasons.append, every=0.01).join(LONG)
  assert asked == [("/computeMetadata/v1/instance/preempted", "Google")] * len(answers)
  assert len(reasons) == 1 and "metadata server" in reasons[0]


def test_off_googles_cloud_nobody_asks_again(monkeypatch):
  monkeypatch.setenv("GCE_METADATA_IP", "localhost:9")  # the discard port: nothing listens
  reasons = []
  signals.watch_metadata(reasons.append, every=0.01).join(LONG)
  assert reasons == []
