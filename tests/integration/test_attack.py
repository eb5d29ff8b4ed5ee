"""The command that attacks a run, in its short form."""

from __future__ import annotations

import re

import pytest

from tests.integration.runs import start


@pytest.mark.slow
def test_the_attack_prints_its_figures() -> None:
    process = start("-m", "tests.attack", "--kills", "4", "--damages", "40")
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert re.search(r"^4 kills \(.*\) in \d+ s: all of 14 steps once, each bit of losses", output, re.M), output
    assert re.search(r"^40 of 40 damages refused by the file's name in \d+ s", output, re.M), output


def test_help_says_how_long_it_takes() -> None:
    process = start("-m", "tests.attack", "--help")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "--kills" in output and "seconds a kill" in output
