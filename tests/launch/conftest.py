"""A launcher with a stand-in for `gcloud`, a clock that does not wait, and a checkout to ship."""
import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

from configs import launch_v5e
from launch import __main__ as command_line, executor
from tests.launch import fake_gcloud

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
  """A git checkout whose content never changes, so that its hash does not either."""
  folder = tmp_path_factory.mktemp("checkout")
  (folder / "train.py").write_text("print('training')\n")
  git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
  for words in (["init", "-q"], ["add", "train.py"], ["commit", "-q", "-m", "first"]):
    subprocess.run([*git, *words], check=True)
  return folder


@pytest.fixture
def config(checkout, tmp_path):
  """Two hosts with four chips each, looked at once a minute."""
  config = launch_v5e.get_config()
  (tmp_path / "requirements.txt").write_text("jax==0.10.2\n")
  config.update(name="run", project="project", bucket="gs://bucket", accelerator_type="v5p-16",
                zone="zone-a", command="lskd train --multi-host --config c.py --workdir /mnt/lskd/work",
                source=str(checkout), requirements=str(tmp_path / "requirements.txt"), python="3.12",
                state=str(tmp_path / "state"))
  return config


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """Makes a cloud (see fake_gcloud.py). `gcloud` is answered within this process, which is quicker."""
  file = tmp_path / "cloud.json"
  real = executor._once

  def once(command):
    if command.words[0] != "gcloud":
      return real(command)
    return fake_gcloud.answer(file, list(command.words[1:]))
  monkeypatch.setattr(executor, "_once", once)

  def make(**cloud):
    file.write_text(json.dumps(cloud))
  make(lives=[])
  return make


@pytest.fixture
def gcloud_on_path(cloud, tmp_path, monkeypatch):
  """The same cloud behind a command of its own, which comes before a real one."""
  monkeypatch.undo()
  (tmp_path / "bin").mkdir()
  gcloud = tmp_path / "bin" / "gcloud"
  gcloud.write_text(f"#!{sys.executable} -SE\n" + (HERE / "fake_gcloud.py").read_text())
  gcloud.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
  monkeypatch.setenv("FAKE_CLOUD", str(tmp_path / "cloud.json"))
  return cloud


@pytest.fixture
def clock():
  """Time that passes only while somebody sleeps; a loop without an end is an error, not a wait."""
  seconds, sleeps = [1_800_000_000.0], []

  def sleep(duration):
    seconds[0] += duration
    sleeps.append(duration)
    assert len(sleeps) < 300, "the launcher does not come to an end"
  return executor.Clock(lambda: seconds[0], sleep)


@pytest.fixture
def arguments(config):
  """Of `python -m launch VERB`, for the config."""
  changed = ("name", "project", "bucket", "accelerator_type", "zone", "source", "requirements", "python",
             "state", "command")
  return ["--config", "configs/launch_v5e.py", *(f"--config.{key}={config[key]}" for key in changed)]


@pytest.fixture
def launch(arguments, cloud, capsys):
  """Calls `python -m launch` with the config; the exit code and what was printed."""
  def call(verb, *more):
    code = command_line.main([verb, *arguments, *more])
    return code, capsys.readouterr()
  return call


@pytest.fixture
def golden(tmp_path, checkout):
  """Compares a text with a file in golden/; UPDATE_GOLDEN=1 writes it instead."""
  def compare(name, text):
    text = text.replace(str(tmp_path), "TMP").replace(str(checkout), "CHECKOUT")
    path = HERE / "golden" / name
    if os.environ.get("UPDATE_GOLDEN"):
      path.write_text(text)
    assert text == path.read_text()
  return compare
