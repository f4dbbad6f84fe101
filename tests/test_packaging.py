"""What a user gets from an installation: packages, data files, the command, a quick import."""
import re
import runpy
import stat
import subprocess
import sys
from unittest import mock

import pytest

from tests.test_borders import PACKAGES, ROOT, SOURCES, imports, top


@pytest.fixture(scope="module")
def described():
  """The arguments that setup.py gives to setuptools."""
  pytest.importorskip("setuptools")
  with mock.patch("setuptools.setup") as setup, pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)  # where find_packages looks
    runpy.run_path(str(ROOT / "setup.py"))
  return setup.call_args.kwargs


def test_every_folder_with_code_is_installed(described):
  folders = {".".join(path.parent.relative_to(ROOT).parts)
             for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
  assert folders <= set(described["packages"]), "a folder of modules lacks its __init__.py"


def test_files_that_code_reads_are_installed(described):
  patterns = described["package_data"]["data_pipeline"]
  package = ROOT / "data_pipeline"
  wanted = {path for path in package.rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc")}
  installed = {path for pattern in patterns for path in package.glob(pattern)}
  assert wanted <= installed


def test_the_command_is_there_and_starts_a_function_that_exists(described):
  assert described["entry_points"] == {"console_scripts": ["lskd = lskd_jax.cli:main"]}
  source = ROOT / "lskd_jax" / "cli.py"
  assert re.search(r"^def main\(", source.read_text(), re.MULTILINE)


def test_the_version_is_written_once(described):
  import lskd_jax
  assert described["version"] == lskd_jax.__version__


def test_every_imported_package_is_a_declared_dependency(described):
  imported_as = {"pillow": "PIL", "pyyaml": "yaml", "orbax_checkpoint": "orbax"}
  names = [re.match(r"[\w-]+", requirement)[0].replace("-", "_")
           for requirement in described["install_requires"]]
  declared = {imported_as.get(name, name) for name in names}
  optional = {"torch", "apache_beam", "libtpu"}  # imported only by commands that say how to install them
  used = {top(name) for path in SOURCES for name in imports(path)}
  assert used - declared - optional - set(PACKAGES) - set(sys.stdlib_module_names) == set()


def test_importing_the_package_does_not_import_jax():
  """`lskd --help` and tools that only ask for the version stay quick."""
  code = "import sys, lskd_jax; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_ci_runs_what_the_readme_says():
  script = ROOT / ".ci" / "run"
  assert script.stat().st_mode & stat.S_IXUSR
  assert "pip install -e '.[test]' && pytest" in (ROOT / "README.md").read_text()
  assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
