"""The tutorial, followed word by word: its files are written, and its commands run in one shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "tutorial.rst"
#: The marker that ends the output of a command.
END = "-- end of the output --"


def files() -> dict[str, str]:
    """Return the files that a reader writes, by name: the first line of a block names its file."""
    return {
        source.split("\n", 1)[0].removeprefix("# "): source for _, source in blocks(PAGE, "python")
    }


def steps() -> list[tuple[str, str]]:
    """Return each command with the output that the page shows, in order."""
    found = []
    for _, block in blocks(PAGE, "console"):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output.strip("\n")))
    return found


def shows(page: str, printed: str) -> bool:
    """Return True if a command printed what the page shows.

    Numbers, ages and spaces may differ. A line of three dots stands for any lines.
    """

    pattern = re.escape(_normal(page)).replace(r"\.\.\.", ".*")
    return re.search(pattern, _normal(printed)) is not None


def _normal(text: str) -> str:
    """Return a text with the same number, unit of time and space everywhere."""
    return re.sub(r"\d[\d.]*(ms|s|m)?", "0", " ".join(text.split()))


@pytest.mark.process
def test_a_reader_who_follows_the_tutorial_sees_what_it_shows(tmp_path):
    for name, source in files().items():
        (tmp_path / name).write_text(source + "\n", encoding="utf-8")
    script = "".join(f"{command}\necho '{END}'\n" for command, _ in steps())
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    ran = subprocess.run(
        ["bash", "-m"],
        input=f"exec 2>&1\n{script}",
        cwd=tmp_path,
        env={"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    printed = ran.stdout.split(END)
    assert len(printed) == len(steps()) + 1
    for (command, output), really in zip(steps(), printed, strict=False):
        assert shows(output, really), f"$ {command}\n{really}"


def test_every_file_that_the_tutorial_runs_is_on_the_page():
    named = {name for command, _ in steps() for name in re.findall(r"\b\w+\.py\b", command)}
    assert named <= files().keys()


def test_another_output_is_noticed():
    assert shows("3 words", "17 words\n")
    assert not shows("3 words", "17 lines\n")
    assert shows("...\n1 passed in ...", ".\n1 passed in 0.01s\n")
    assert not shows("...\n1 passed in ...", "F\n1 failed in 0.01s\n")
