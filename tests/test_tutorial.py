"""The tutorial, followed word by word. ``make build`` follows a part of it with the wheel."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT

tool = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "follow_tutorial.py")))


@pytest.mark.process
def test_a_reader_who_follows_the_tutorial_sees_what_it_shows(tmp_path):
    programs = Path(sys.executable).parent
    assert tool.follow(programs, tmp_path, tool.steps(), PYTHONPATH=str(ROOT)) == []


def test_every_file_that_the_tutorial_runs_is_on_the_page():
    commands = [command for command, _ in tool.steps()]
    assert len(commands) > 10
    named = {name for command in commands for name in re.findall(r"\b\w+\.py\b", command)}
    assert named <= tool.files().keys()


def test_another_output_is_noticed():
    assert tool.shows("3 words", "17 words\n")
    assert not tool.shows("3 words", "17 lines\n")
    assert tool.shows("...\n1 passed in ...", ".\n1 passed in 0.01s\n")
    assert not tool.shows("...\n1 passed in ...", "F\n1 failed in 0.01s\n")
