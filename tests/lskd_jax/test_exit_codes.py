"""The exit codes that are documented are those of the code, and so is whether to start again."""
from pathlib import Path
import re

import pytest

from lskd_jax import exit_codes

ROOT = Path(__file__).resolve().parents[2]


def table(path: str) -> dict[int, str]:
  """{code: "no" | "yes" | …} of the table of exit codes in a file."""
  rows = re.findall(r"^\| ([\d, ]+) \| .+ \| ((?:no|yes).*) \|$", (ROOT / path).read_text(), re.M)
  return {int(code): again for codes, again in rows for code in codes.split(",")}


@pytest.mark.parametrize("path", ["README.md", "docs/survival.md", "lskd_jax/exit_codes.py"])
def test_every_exit_code_is_documented_with_whether_it_is_started_again(path):
  codes = {value for value in vars(exit_codes).values() if isinstance(value, int)}
  documented = table(path)
  assert documented.keys() == codes | {134, 137, 143}
  for code, again in documented.items():
    assert exit_codes.restarts(code) == again.startswith("yes"), code
    assert (code in exit_codes.PREEMPTIONS) == (again == "yes"), code
