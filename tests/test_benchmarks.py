"""The benchmark runs, its table is whole, and what it counts is what the documentation says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "performance.rst"
Table = dict[tuple[str, str, str], str]

needs_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="pins to cores and reads /proc"
)
pytestmark = needs_linux


def benchmark(*args: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--rounds", "1", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each simple table of reStructuredText, without its header."""
    found = []
    rule = r"^(=+(?:  =+)+)\n"
    for match in re.finditer(rf"{rule}.*\n\1\n((?:.+\n)+?)\1$", text, re.M):
        ends = [(column.start(), column.end()) for column in re.finditer("=+", match[1])]
        lines = match[2].splitlines()
        found.append([[line[start:end].strip() for start, end in ends] for line in lines])
    return found


def measured(*args: str) -> Table:
    [table] = tables(benchmark("--rst", *args))
    return {(what, who, durability): value for what, who, durability, value, *_ in table}


@pytest.fixture(scope="module")
def costs() -> Table:
    return measured("--tasks", "400", "--only", "cost")


def test_every_figure_is_measured_at_every_durability():
    table = measured("--tasks", "40", "--only", "submit", "--only", "together")
    for what in ("submit one by one", "producer and workers"):
        for durability in ("accepted", "full", "process"):
            for who in ("floor", "TaskX"):
                assert re.fullmatch(r"[\d,]+/s", table[what, who, durability])


def test_peer_that_is_not_installed_is_named_loudly():
    table = measured("--tasks", "10", "--only", "drain")
    for who, durability in (("huey", "full"), ("litequeue", "process"), ("persist-queue", "full")):
        value = table["drain a backlog", who, durability]
        assert value == "NOT INSTALLED" or value.endswith("/s")
    assert table["drain a backlog", "ThreadPoolExecutor", "memory"].endswith("/s")


def test_tables_are_put_into_the_document(tmp_path):
    copy = tmp_path / "performance.rst"
    copy.write_text(DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    benchmark("--tasks", "10", "--only", "begins", "--no-peers", "--update", str(copy))
    text = copy.read_text(encoding="utf-8")
    before, after = DOCUMENT.read_text(encoding="utf-8").split(".. measured from here on")
    assert text.startswith(before)
    assert text.endswith(after.partition(".. measured up to here")[2])
    assert [row[0] for row in tables(text)[-1]] == ["idle: submit to begin, p50"] * 2 + [
        "idle: submit to begin, p99"
    ] * 2


@pytest.mark.parametrize("durability", ["accepted", "process"])
def test_task_costs_what_the_documentation_says(costs, durability):
    documented = tables(DOCUMENT.read_text(encoding="utf-8"))[0]
    assert len(documented) == 3
    for what, writes, commits in documented:
        for kind, said in (("writes", writes), ("commits", commits)):
            counted = float(costs[f"{what}: {kind}", "TaskX", durability])
            if said.startswith("below "):
                assert counted < float(said.removeprefix("below "))
            else:
                assert counted == pytest.approx(float(said), abs=0.2)


def test_submit_waits_for_nobody(costs):
    """Neither are the records stored by other threads, but for the odd one that came along with
    theirs, nor does the thread that submits fall asleep."""
    for durability in ("accepted", "process"):
        share = costs["submits written by another thread", "TaskX", durability]
        assert float(share.removesuffix(" %")) < 50
    assert float(costs["a submit: times the thread waited", "TaskX", "process"]) < 0.5
