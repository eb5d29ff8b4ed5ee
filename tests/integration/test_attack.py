"""The command that attacks a run, in its short form."""

from __future__ import annotations

import re

import pytest

from tests.launching import launch


@pytest.mark.slow
def test_the_attack_prints_its_figures() -> None:
    ended = launch("tests.attack", "--kills", "4", "--damages", "40", timeout_s=500)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^4 kills \(.*\) in \d+ s: all of 14 steps once, each bit of losses", ended.stdout, re.M), ended
    assert re.search(r"^40 of 40 damages refused by the file's name in \d+ s", ended.stdout, re.M), ended


def test_help_says_how_long_it_takes() -> None:
    ended = launch("tests.attack", "--help")
    assert ended.returncode == 0 and "--kills" in ended.stdout and "seconds a kill" in ended.stdout
