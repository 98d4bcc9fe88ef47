"""The built documentation: its reference, and the check of its links. ``make docs`` builds it."""

from __future__ import annotations

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
    described = re.findall(r"^\.\. auto(?:class|function):: taskx\.(\w+)$", text, re.M)
    assert sorted(described) == sorted(taskx.__all__)


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "check_links.py"), str(folder)]
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
def test_a_missing_folder_is_told(tmp_path):
    found = check(tmp_path / "gone")
    assert (found.returncode, found.stderr) == (2, f"{tmp_path / 'gone'} is not a folder\n")
