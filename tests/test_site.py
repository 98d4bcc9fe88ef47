"""The built documentation: its reference, and the check of its pages. ``make docs`` builds it."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import taskx

ROOT = Path(__file__).parent.parent
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.rst"))


def test_the_reference_has_each_public_name_once():
    text = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE)
    described = re.findall(r"^\.\. auto(?:class|function):: taskx\.(\w+)(?:\(\))?$", text, re.M)
    assert sorted(described) == sorted(taskx.__all__)


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "check_site.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.process
def test_a_link_to_a_missing_page_or_anchor_is_broken(tmp_path):
    (tmp_path / "sub").mkdir()
    links = ["sub/b.html#here", "sub/b.html#gone", "gone.html", "https://example.org", "#top"]
    body = "".join(f'<a href="{link}">x</a>' for link in links)
    (tmp_path / "a.html").write_text(f'<p id="top">{body}</p>')
    (tmp_path / "sub" / "b.html").write_text('<p id="here"><a href="../a.html#top">x</a></p>')
    found = check(tmp_path)
    assert found.returncode == 1
    assert found.stderr.splitlines() == [
        "broken link: a.html: sub/b.html#gone",
        "broken link: a.html: gone.html",
    ]


@pytest.mark.process
def test_a_list_of_sections_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<nav class="contents local"><ul></ul></nav>')
    (tmp_path / "b.html").write_text("<h2>The contents of a page</h2>")
    found = check(tmp_path)
    assert found.returncode == 1
    assert found.stderr == "list of sections, over which the theme draws an error: a.html\n"


@pytest.mark.process
@pytest.mark.parametrize(
    ("parameters", "unfit"),
    [
        ("queue: ~taskx.queue.queue.Queue", "~taskx.queue.queue.Queue"),
        ("*args: ~P", "~P"),
        (
            "clock: Clock = &lt;taskx.tasks.clock.SystemClock object&gt;",
            "<taskx.tasks.clock.SystemClock object>",
        ),
        ("task: taskx.tasks.model.Task", "taskx.tasks.model.Task"),
        ("clock: Clock = ..., *, prefix: str = 'taskx_'", None),
    ],
)
def test_a_signature_that_is_not_plain_python_is_found(tmp_path, parameters, unfit):
    (tmp_path / "a.html").write_text(
        '<p>~taskx.queue.Queue</p><dt class="sig sig-object py"><span class="sig-prename descclassname">'
        f'taskx.testing.</span><span class="descname">f</span>(<em>{parameters}</em>)</dt><p>~P</p>'
    )
    found = check(tmp_path)
    expected = (
        f"{unfit!r} in a signature: a.html: f({html.unescape(parameters)})\n" if unfit else ""
    )
    assert (found.returncode, found.stderr) == (int(unfit is not None), expected)


@pytest.mark.process
def test_a_missing_folder_is_told(tmp_path):
    found = check(tmp_path / "gone")
    assert (found.returncode, found.stderr) == (2, f"{tmp_path / 'gone'} is not a folder\n")
