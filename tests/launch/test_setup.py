"""setup.sh on a host where everything is installed; the commands it calls are stand-ins.

In the file `mount` is what lies at the mount point: nothing, a mounted bucket, or a "dead" one, whose gcsfuse
was killed. As in Linux, no other user may look into a FUSE file system, not even root.
"""
from pathlib import Path
import re
import subprocess

import pytest

from launch import manifests

NEW = "--rename-dir-limit int --metadata-cache-ttl-secs int --metadata-cache-negative-ttl-secs int"
SETUP = Path("launch/setup.sh").absolute()
COMMANDS = {
    "gcsfuse": """
        if [ "$*" = --help ]; then cat "$HOST/help"
        else echo mounted > "$HOST/mount"; fi""",
    "curl": "",
    "lsb_release": "echo jammy",
    "mountpoint": '[ "$(cat "$HOST/mount")" = mounted ]',
    "sudo": """
        if [ "$1" = umount ]; then echo > "$HOST/mount"
        elif [ "$1" = tee ]; then cat > /dev/null
        elif [ "$1" = apt-get ]; then echo "$NEW" > "$HOST/help"
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

  def setup(mount, help=NEW):
    (tmp_path / "mount").write_text(mount)
    (tmp_path / "help").write_text(help)
    (tmp_path / "commands").write_text("")
    words = ["gs://b/code", "version", "b", str(tmp_path / "bucket"), "3.12", "0.8"]
    variables = {"HOST": str(tmp_path), "HOME": str(tmp_path), "NEW": NEW,
                 "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    done = subprocess.run(["bash", SETUP, *words], capture_output=True, text=True, timeout=60, env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "mount").read_text() == "mounted\n"
    return (tmp_path / "commands").read_text()
  return setup


def mount_flags(commands):
  flags, = re.findall(r"gcsfuse (--implicit.*) b ", commands)
  return flags.split()


def test_the_bucket_is_mounted_so_that_checkpoints_can_be_committed(host):
  assert mount_flags(host("")) == ["--implicit-dirs", "--rename-dir-limit=200000",
                                   "--metadata-cache-ttl-secs=5", "--metadata-cache-negative-ttl-secs=0"]


def test_pods_mount_it_in_the_same_way(host):
  """There a flag is FLAG, or SECTION:FLAG:VALUE of gcsfuse's config file."""
  flags = [f"--{option}" for option in manifests.MOUNT_OPTIONS]
  flags = [re.sub(r":(\d+)$", r"=\1", flag).replace("file-system:", "").replace(":", "-") for flag in flags]
  assert flags == mount_flags(host(""))


def test_an_old_gcsfuse_is_replaced(host):
  """A machine's image may come with one that does not know the flags."""
  assert "install -q -y gcsfuse" in host("", help="--implicit-dirs")
  assert "apt-get" not in host("")


def test_a_bucket_that_is_mounted_stays_so(host):
  assert "sudo" not in host("mounted\n"), "root may not look into it"


def test_a_dead_mount_is_taken_away_first(host):
  commands = host("dead\n")
  steps = ["sudo umount -l", "sudo mkdir", "sudo chown", "gcsfuse --implicit-dirs"]
  assert sorted(steps, key=commands.index) == steps
