"""setup.sh on a host where everything is installed; the commands it calls are stand-ins.

In the file `mount` is what lies at the mount point: nothing, a mounted bucket, or a "dead" one, whose gcsfuse
was killed. As in Linux, no other user may look into a FUSE file system, not even root.
"""
from pathlib import Path
import subprocess

import pytest

SETUP = Path("launch/setup.sh").absolute()
COMMANDS = {
    "gcsfuse": 'echo mounted > "$HOST/mount"',
    "mountpoint": '[ "$(cat "$HOST/mount")" = mounted ]',
    "sudo": """
        if [ "$1" = umount ]; then echo > "$HOST/mount"
        elif [ -n "$(cat "$HOST/mount")" ]; then echo "$1: cannot access '$HOST/bucket'" >&2; exit 1
        else "$@"; fi""",
}


@pytest.fixture
def host(tmp_path):
  """Calls setup.sh; its result and the commands that it ran."""
  (tmp_path / "bin").mkdir()
  for name, script in COMMANDS.items():
    path = tmp_path / "bin" / name
    path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$HOST/commands"\n{script}\n')
    path.chmod(0o755)
  ready = tmp_path / "lskd" / "version" / "ready"
  ready.parent.mkdir(parents=True)
  ready.touch()  # the code is there already

  def setup(mount):
    (tmp_path / "mount").write_text(mount)
    (tmp_path / "commands").write_text("")
    words = ["gs://b/code", "version", "b", str(tmp_path / "bucket"), "3.12", "0.8"]
    done = subprocess.run(["bash", SETUP, *words], capture_output=True, text=True, timeout=60, env={
        "HOST": str(tmp_path), "HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "mount").read_text() == "mounted\n"
    return (tmp_path / "commands").read_text()
  return setup


def test_a_new_host_mounts_the_bucket(host):
  assert "gcsfuse --implicit-dirs" in host("")


def test_a_bucket_that_is_mounted_stays_so(host):
  assert "sudo" not in host("mounted\n"), "root may not look into it"


def test_a_dead_mount_is_taken_away_first(host):
  commands = host("dead\n")
  assert commands.index("sudo umount -l") < commands.index("sudo mkdir") < commands.index("gcsfuse ")
