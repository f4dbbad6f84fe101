"""Notices that a process is to end: SIGTERM, SIGHUP, the preempted flag of Google's metadata server, and the
end of its parent."""
import ctypes
import os
import select
import signal
import sys
import threading
import time

METADATA = "metadata.google.internal"
FLAG = "/computeMetadata/v1/instance/preempted"
LIBC = ctypes.CDLL(None)  # here: in a child between fork and exec it may wait for the lock of a lost thread


class Term:
  """SIGTERM, noticed by a thread also while the main thread is in a compile or a blocked collective.

  There Python's handlers do not run, but its C handler writes the signal's number to a pipe at once. SIGHUP,
  of a terminal that closes, means the same unless `nohup` has it ignored. Make it in the main thread; a
  second signal changes nothing, and other signals are left alone.
  """

  def __init__(self):
    self._received, self._closed = None, False
    self._before = {signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
      self._before[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._own()
    os.register_at_fork(after_in_child=self.close)  # whose signals are not ours, though the pipe is

  def _own(self) -> None:
    for number in self._before:
      signal.signal(number, self._handle)
    signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    self._address = kernel_handler(signal.SIGTERM)  # Python has one for all signals

  def _handle(self, number, frame) -> None:
    self._received = signal.Signals(number).name  # no lock here: the main thread may hold it

  def wait(self, seconds: float) -> str | None:
    """The name of the signal that has come, None without one; waits up to `seconds` for it."""
    if select.select([self._read], [], [], seconds)[0]:
      for number in self._before.keys() & set(os.read(self._read, 4096)):
        self._received = signal.Signals(number).name
    return self._received

  def keep(self) -> str | None:
    """Puts our handlers back if one was replaced, and returns by whom and of what; None if all is well."""
    found = [f"{culprit} replaced the handler of {number.name}"
             for number in self._before if (culprit := self._culprit(number))]
    if not found and signal.set_wakeup_fd(self._write, warn_on_full_buffer=False) != self._write:
      found = ["a user of signal.set_wakeup_fd replaced the pipe of signals"]
    if found:
      self._own()
    return found[0] if found else None

  def _culprit(self, number: signal.Signals) -> str | None:
    """Who has a signal now; None if we do. Python's own table does not know of handlers that C code
    installs, so the kernel's is compared too."""
    python, address = signal.getsignal(number), kernel_handler(number)
    if python != self._handle:
      module = getattr(python, "__module__", None)
      return f"Python code in {module}" if module and callable(python) else f"Python code ({python})"
    return None if address == self._address else f"a C library ({library_of(address)})"

  def close(self, ignore: bool = False) -> None:
    """Restores what was there before; or, for a process that ends as it was told, ignores the signals."""
    if not self._closed:
      self._closed = True
      for number, handler in self._before.items():
        signal.signal(number, signal.SIG_IGN if ignore else handler)
      signal.set_wakeup_fd(-1)


def kernel_handler(number: int) -> int:
  """The address of the function that the system calls for a signal; 0 is the default, 1 ignores it."""
  action = (ctypes.c_size_t * 64)()  # struct sigaction begins with the address; 64 words hold any
  if LIBC.sigaction(number, None, ctypes.byref(action)):
    raise OSError(f"sigaction({number}) failed")
  return action[0]


def library_of(address: int) -> str:
  """The file name of the shared library that holds a function, by dladdr."""
  class Found(ctypes.Structure):
    _fields_ = [("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("symbol", ctypes.c_char_p),
                ("at", ctypes.c_void_p)]
  found = Found()
  if address > 1 and LIBC.dladdr(ctypes.c_void_p(address), ctypes.byref(found)) and found.file:
    return os.path.basename(os.fsdecode(found.file))
  return {0: "the default action", 1: "ignored"}.get(address, "unknown")


def end_with_parent(number: signal.Signals) -> None:
  """For a child, also between fork and exec: Linux sends it this signal when the thread that made it ends."""
  if sys.platform == "linux":
    LIBC.prctl(1, number)  # PR_SET_PDEATHSIG


def watch_metadata(notify, every: float = 5.0) -> threading.Thread:
  """Calls notify(reason) once Google's metadata server says that this machine is preempted.

  A daemon thread asks every `every` seconds, and ends if nothing answers three times at first: off Google's
  cloud nobody waits for it. An error is an answer, too. GCE_METADATA_IP or GCE_METADATA_HOST name another
  host, as for JAX and Google's own libraries.
  """
  def preempted(opener) -> bool | None:
    """None if nothing answers, or nothing that can be read."""
    request = urllib.request.Request(f"http://{host}{FLAG}", headers={"Metadata-Flavor": "Google"})
    try:
      with opener.open(request, timeout=5.0) as answer:
        return answer.read(16).strip() == b"TRUE"
    except (OSError, http.client.HTTPException) as error:
      return False if isinstance(error, urllib.error.HTTPError) else None

  def watch():
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    there, tries = False, 0
    while not (found := preempted(opener)):
      there, tries = there or found is not None, tries + 1
      if tries == 3 and not there:
        return
      time.sleep(every)
    notify("the metadata server says that this machine is preempted")

  import http.client
  import urllib.error
  import urllib.request
  host = os.environ.get("GCE_METADATA_IP") or os.environ.get("GCE_METADATA_HOST") or METADATA
  thread = threading.Thread(target=watch, daemon=True, name="metadata")
  thread.start()
  return thread
