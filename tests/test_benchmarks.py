"""The benchmark runs, its tables are complete, and its counts are those in the documentation."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import eventually

import taskx

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "performance.rst"
PEERS = {
    "TaskX, workers apart": "process",
    "ThreadPoolExecutor": "memory",
    "huey": "full",
    "huey fsync=False": "none",
    "litequeue": "process",
    "persist-queue": "full",
    "honker": "process",
    "honker in batches": "process",
    "flexiq": "process",
    "tinyjobs": "process",
    "DBOS": "full",
    "django-tasks-db": "full",
    "django-ox": "process",
    "threadmill": "server",
    "RQ": "server",
    "Dramatiq": "server",
    "Celery": "server",
}
#: The columns of the table of the peers.
SIDE_BY_SIDE = [
    "who",
    "durability",
    "keeps",
    "submit/s",
    "drain/s",
    "both/s",
    "begins p50 µs",
    "p99 µs",
    "result p50 µs",
    "p99 µs",
    "sleeps × ideal",
    "wake-up p50 ms",
    "p99 ms",
]
Table = dict[tuple[str, str, str], str]

needs_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="pins to cores and reads /proc"
)
needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="compares with a commit: not a git checkout"
)
pytestmark = [needs_linux, pytest.mark.process]


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
    """Return the cells of each simple table of reStructuredText, without its header."""
    return [table for _, *table in with_headers(text)]


def with_headers(text: str) -> list[list[list[str]]]:
    """Return the cells of each simple table of reStructuredText."""
    found = []
    rule = r"^(=+(?:  =+)+)\n"
    for match in re.finditer(rf"{rule}(.*\n)\1\n((?:.+\n)+?)\1$", text, re.M):
        ends = [(column.start(), column.end()) for column in re.finditer("=+", match[1])]
        lines = [match[2], *match[3].splitlines()]
        found.append([[line[start:end].strip() for start, end in ends] for line in lines])
    return found


def measured(*args: str) -> Table:
    [table] = tables(benchmark("--rst", *args))
    return {(what, who, durability): value for what, who, durability, value, *_ in table}


@pytest.fixture(scope="module")
def costs() -> Table:
    return measured("--tasks", "400", "--only", "cost")


def test_figures_are_measured_at_every_durability():
    table = measured("--tasks", "40", "--no-peers", "--only", "submit", "--only", "together")
    for what in ("submit one by one", "producer and workers"):
        for durability in ("accepted", "full", "process"):
            for who in ("floor", "TaskX"):
                assert re.fullmatch(r"[\d,]+/s", table[what, who, durability])


@pytest.mark.parametrize("who", PEERS)
def test_each_peer_is_measured_or_named_as_missing(who):
    """The table may also have a peer whose name only begins with this one's."""
    printed = benchmark("--rst", "--tasks", "4", "--only", who)
    [table] = [rows for header, *rows in with_headers(printed) if header == SIDE_BY_SIDE]
    [row] = [row for row in table if row[0] == who]
    assert row[1] == PEERS[who]
    submit, drain, both, *others = row[3:]
    if submit == "NOT INSTALLED":
        assert re.search(
            rf"^NOT MEASURED: .*\b{re.escape(who)} \(.* NOT INSTALLED\)", printed, re.M
        )
    else:
        rank = "" if PEERS[who] == "memory" else r" \(\d+\)"
        assert all(re.fullmatch(rf"[\d,]+{rank}", rate) for rate in (submit, drain, both))
        assert all(re.fullmatch(rf"[\d,.]+{rank}|–", figure) for figure in others)


def test_the_documented_table_has_taskx_both_floors_and_all_peers():
    text = DOCUMENT.read_text(encoding="utf-8")
    measured = text.partition(".. measured from here on")[2].partition(".. measured up to here")[0]
    found = [table for table in with_headers(measured) if table[0][0] == "who"]
    assert found
    for header, *table in found:
        assert header == SIDE_BY_SIDE
        rows = {(row[0], row[1]) for row in table}
        ours = {
            (who, durability)
            for who in ("floor", "lean floor", "TaskX")
            for durability in ("accepted", "full", "process")
        }
        assert rows == ours | set(PEERS.items())


def test_the_table_has_a_lean_floor():
    table = measured("--tasks", "40", "--no-peers", "--only", "submit", "--only", "drain")
    for what in ("submit one by one", "drain a backlog"):
        for durability in ("accepted", "full", "process"):
            assert table[what, "lean floor", durability].endswith("/s")


def test_sleeping_tasks_are_submitted_one_by_one_and_at_once():
    table = measured("--tasks", "10", "--no-peers", "--only", "sleepers")
    for what in ("10 ms sleeps on 32 threads", "10 ms sleeps, by submit_many"):
        for durability in ("accepted", "process"):
            assert table[what, "TaskX", durability].endswith("× ideal")


def test_bursts_of_schedules_and_delayed_tasks_are_measured():
    table = measured("--tasks", "40", "--no-peers", "--only", "burst", "--only", "idle-schedules")
    for burst in ("many schedules tick", "many tasks are due"):
        for what in ("longest round", "work of a round"):
            assert re.fullmatch(r"\d+ ms", table[f"{burst}: {what}", "TaskX", "accepted"])
    assert table["many idle schedules: share of a core", "TaskX", "process"].endswith(" %")


def test_figures_on_mongo_are_measured():
    only = [arg for figure in ("submit", "trips") for arg in ("--only", figure)]
    table = measured("--mongo", "--tasks", "40", "--no-peers", *only)
    for who in ("floor", "TaskX"):
        assert table["submit one by one", who, "majority"].endswith("/s")
    assert table["a submit: round trips", "TaskX", "majority"] == "1.00"
    backlog = table["start and finish, of a backlog: round trips", "TaskX", "majority"]
    assert float(backlog) <= 1.5


def test_a_map_is_measured_beside_those_of_other_libraries():
    printed = benchmark("--rst", "--tasks", "40", "--only", "map")
    found = {row[1]: row[3] for row in tables(printed)[-1]}
    if "joblib NOT INSTALLED" in printed:
        found["joblib"] = "0/s"
    assert found.keys() == {"TaskX", "ThreadPoolExecutor", "joblib"}
    assert all(re.fullmatch(r"[\d,]+/s", value) for value in found.values())


def test_a_failed_peer_is_in_the_table(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import report
    from benchmarks.children import ChildFailed
    from benchmarks.harness import Cell, measure

    def fail(folder: str) -> dict[str, float]:
        raise ChildFailed("its server would not start")

    found = measure([Cell("Rival", "full", fail, ("drain",), rival=True)], 1, progress=False)
    [row] = report.side_by_side(found)
    assert dict(zip(report.HEADER_SIDE_BY_SIDE, row, strict=True)) == dict.fromkeys(
        report.HEADER_SIDE_BY_SIDE, "–"
    ) | {"who": "Rival", "durability": "full", "keeps": "record, result", "drain/s": "FAILED"}
    assert report.complaints(found) == ["Rival (FAILED)"]
    assert "its server would not start" in capsys.readouterr().err


def test_a_figure_has_its_rank_among_the_queues_that_store_tasks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import report
    from benchmarks.harness import Measured

    values = {
        ("floor", "process", False): (9, 1),
        ("TaskX", "process", False): (5, 3),
        ("Rival", "full", True): (7, 4),
        ("Threads", "memory", True): (8, 2),
    }
    measured = {
        (figure, who, durability): Measured(figure, who, durability, rival, values=[value])
        for (who, durability, rival), both in values.items()
        for figure, value in zip(("submit", "begins-p50"), both, strict=True)
    }
    found = {
        who: (submit, begins)
        for who, _, _, submit, _, _, begins, *_ in report.side_by_side(measured)
    }
    assert found == {
        "floor": ("9", "1"),
        "TaskX": ("5 (2)", "3 (1)"),
        "Rival": ("7 (1)", "4 (2)"),
        "Threads": ("8", "2"),
    }
    goals = {row[0]: row[-2:] for row in report.rows(measured) if row[1] == "TaskX"}
    assert goals["submit one by one"] == ("≥ 0.6 × floor, ahead of Rival", "SHORT")
    assert goals["idle: submit to begin, p50"] == ("≤ 250 µs, ahead of Rival", "yes")


@needs_git
def test_this_tree_is_compared_with_an_earlier_one():
    """The same code gives the same counts."""
    printed = benchmark(
        "--rst", "--against", "HEAD", "--tasks", "20", "--only", "cost-submit-writes"
    )
    [table] = tables(printed)
    found = [row[2:] for row in table if row[:2] == ["a submit: writes", "TaskX"]]
    same = ["1.00", "1.00", "1.00", "1.00 … 1.00"]
    assert sorted(found) == [["accepted", *same], ["process", *same]]


@pytest.mark.parametrize("module", ["suites", "node"])
def test_what_is_compared_imports_only_public_names(module):
    """Else an earlier commit could not be measured."""
    program = f"""
import benchmarks.{module}, sys
for module in [m for name, m in sys.modules.items() if name.startswith("benchmarks")]:
    for value in vars(module).values():
        if (getattr(value, "__module__", None) or "").startswith("taskx.") and hasattr(value, "__name__"):
            print(value.__name__)
"""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from benchmarks import children
    used = {*children.run("-c", program).split()}
    assert used
    assert used <= {*taskx.__all__}


@needs_git
def test_the_package_of_the_earlier_commit_is_measured(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from benchmarks import against, children
    against.unpack("HEAD", str(tmp_path))
    where = "import benchmarks.harness, taskx; print(taskx.__file__)"
    found = children.run("-c", where, tree=str(tmp_path)).strip()
    assert found == str(tmp_path / "taskx" / "__init__.py")
    with pytest.raises(SystemExit, match=r"--against nowhere: .*nowhere"):
        against.unpack("nowhere", str(tmp_path))


def test_figures_of_several_processes_are_measured():
    figures = ("left", "both", "rescue", "elsewhere", "cancel", "others")
    only = [arg for figure in figures for arg in ("--only", figure)]
    table = measured("--tasks", "40", "--no-peers", *only)
    found = {what: value for (what, who, _), value in table.items() if who == "TaskX"}
    assert {
        what: value.split(maxsplit=1)[-1].lstrip("0123456789,.") for what, value in found.items()
    } == {
        "drain a dead process's tasks": "/s",
        "one process drains a file": "/s",
        "two processes drain one file": "/s",
        "two processes: to one": "× one",
        "two processes: the smaller share": "%",
        "kill -9: task starts again elsewhere": "ms",
        "submit to begin elsewhere, p50": "ms",
        "submit to begin elsewhere, p99": "ms",
        "end of a task elsewhere to result(), p50": "ms",
        "end of a task elsewhere to result(), p99": "ms",
        "cancel reaches a task elsewhere, p50": "ms",
        "cancel reaches a task elsewhere, p99": "ms",
        "idle with busy others: share of a core": "%",
    }


def test_figures_with_delayed_tasks_are_measured():
    table = measured("--tasks", "40", "--finished", "1500", "--no-peers", "--only", "delayed")
    for size in ("1,000", "1,500"):
        assert table["drain with delayed tasks", f"TaskX, {size} delayed", "process"]
        late = table["begins after its run_at, p99", f"TaskX, {size} delayed", "process"]
        assert late.endswith(" ms")


def test_figures_with_finished_tasks_are_measured():
    table = measured("--tasks", "40", "--finished", "1500", "--no-peers", "--only", "finished")
    for what in ("drain", "get one", "list 20 newest"):
        for size in ("1,000", "1,500"):
            assert table[f"{what} with finished tasks", f"TaskX, {size} finished", "process"]
    assert table["count finished tasks", "TaskX, 1,500 finished", "process"].endswith(" ms")


def test_importing_taskx_loads_no_optional_package():
    assert (
        measured("--no-peers", "--only", "import")["import taskx: optional packages", "TaskX", ""]
        == "0"
    )


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Return True if a process runs; a zombie does not."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process(number, tmp_path):
    """Its children end with it, however it ends."""
    program = [sys.executable, "-m", "benchmarks", "--no-peers", "--only", "elsewhere"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed run leaves its files
    with subprocess.Popen(program, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as run:
        children = eventually(lambda: children_of(run.pid))
        run.send_signal(number)
        _, said = run.communicate()
    assert run.returncode != 0
    assert "interrupted" in said or number == signal.SIGKILL
    eventually(lambda: not any(map(runs, children)))


def test_update_writes_the_tables_into_the_document(tmp_path):
    copy = tmp_path / "performance.rst"
    copy.write_text(DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    benchmark("--tasks", "10", "--only", "sleepers", "--no-peers", "--update", str(copy))
    text = copy.read_text(encoding="utf-8")
    before, after = DOCUMENT.read_text(encoding="utf-8").split(".. measured from here on")
    assert text.startswith(before)
    after = after.partition(".. measured up to here")[2]
    assert text.endswith(after)
    [table] = tables(text.removeprefix(before).removesuffix(after))
    assert [row[0] for row in table] == [
        *["10 ms sleeps on 32 threads"] * 2,
        *["10 ms sleeps, by submit_many"] * 2,
    ]


@pytest.mark.parametrize("durability", ["accepted", "process"])
def test_the_costs_of_a_task_are_those_in_the_documentation(costs, durability):
    documented = tables(DOCUMENT.read_text(encoding="utf-8"))[0]
    assert len(documented) == 3
    for what, writes, commits in documented:
        for kind, said in (("writes", writes), ("commits", commits)):
            counted = float(costs[f"{what}: {kind}", "TaskX", durability])
            if said.startswith("below "):
                assert counted < float(said.removeprefix("below "))
            else:
                assert counted == pytest.approx(float(said), abs=0.2)


def test_a_submit_does_not_wait_for_other_threads(costs):
    """Other threads store at most a few of the records, and the submitting thread does not wait."""
    for durability in ("accepted", "process"):
        share = costs["submits written by another thread", "TaskX", durability]
        assert float(share.removesuffix(" %")) < 50
    assert float(costs["a submit: times the thread waited", "TaskX", "process"]) < 0.5


# --- engines, and how far they go


@pytest.fixture
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def site(on_path):
    """A task uses its host for 2 ms and the store for 1 ms; a node uses the store for 10 ms in a second."""
    from benchmarks.capacity import Cost, Operation, Site

    task = Cost(0.002, 0.001)
    return Site("site", Operation(task, task), node=Cost(0.0, 0.010), store_cores=1.0)


def test_a_store_that_a_task_uses_for_a_millisecond_does_not_pass_a_thousand(site):
    most = [site.most(hosts)[0] for hosts in (1, 2, 3, 4, 16, 64)]
    assert most == pytest.approx([500, 980, 970, 960, 840, 360])
    assert site.most(100)[0] == pytest.approx(0)  # the polls of the nodes use all of the store


def test_the_bottleneck_moves_from_the_hosts_to_the_store(site):
    assert [site.most(hosts)[1] for hosts in (1, 2, 3)] == ["hosts", "store", "store"]


def test_several_nodes_look_what_the_others_have_changed(site):
    """It costs the store 10 ms more for each node in a second, however many tasks there are."""
    from dataclasses import replace

    from benchmarks.capacity import Cost

    watched = replace(site, task=replace(site.task, watching=Cost(0.0, 0.010)))
    assert watched.most(1) == site.most(1)
    assert watched.most(10)[0] == pytest.approx(0.8 / 0.001)
    assert watched.most_on(1.0, processes=2, nodes=2) == pytest.approx(0.96 / 0.003)


def test_a_broker_is_the_bottleneck_if_a_task_uses_it_most(on_path):
    from benchmarks.capacity import NOTHING, Cost, Operation, Site

    task = Cost(0.002, 0.001, 0.005)
    site = Site("site", Operation(task, task), NOTHING, store_cores=4.0)
    assert site.most(8) == (pytest.approx(200), "broker")


def test_what_shares_a_machine_shares_its_cores(site):
    """Two processes on two cores with the store: 2 × 10 ms of polls, then 3 ms for each task."""
    assert site.most_on(2.0, processes=2, nodes=2) == pytest.approx(1.98 / 0.003)
    assert site.most_on(8.0, processes=2, nodes=2) == pytest.approx(980)  # the store is one core
    assert site.most_on(8.0, processes=1, nodes=2) == pytest.approx(500)


def test_simulated_waits_are_those_of_the_theory(on_path):
    """One queue with exponential times: the mean is the time of service over the share that is free."""
    from benchmarks.capacity import NOTHING, Cost, Operation, Site

    task = Cost(0.0, 0.001)
    site = Site("site", Operation(task, task), NOTHING, store_cores=1.0)
    for rate in (100.0, 500.0, 800.0):
        waits = site.waits(1, rate, 50_000)
        assert sum(waits) / len(waits) == pytest.approx(0.001 / (1 - rate / 1000), rel=0.1)
    assert site.waits(1, 1000.0, 3) == [float("inf")] * 3


def test_costs_are_printed_with_a_forecast_for_each_number_of_hosts(site):
    from benchmarks import scale

    assert scale.forecast(site, 2, 100.0)[:5] == ("site", "2", "980", "store", scale.SPLIT["store"])
    assert scale.forecast(site, 2, 980.0)[5:] == ("–", "–")


def test_the_costs_of_operations_are_measured(on_path, tmp_path):
    """Here a SQLite file is the store, and so nothing is the server's time."""
    from benchmarks import children, operations
    from benchmarks.stores import OnSQLite

    with children.talking("-c", "input()") as server:
        place = operations.Place(OnSQLite("process"), server.pid, str(tmp_path), ("", 0))
        submit = operations.of_submit(place, 50)
        run = operations.cost_of(operations.drain(place, 50, {}), 50)
    assert 0 < submit.hosts < 0.1
    assert 0 < run.hosts < 0.1
    assert submit.broker == run.broker == 0


def test_tasks_beside_other_nodes_show_what_each_node_costs(on_path, tmp_path, monkeypatch):
    from contextlib import nullcontext
    from types import SimpleNamespace

    from benchmarks import operations, scale
    from benchmarks.capacity import Cost

    def run(place, tasks, pids):
        """A task takes the store 1 ms, beside others 3. They look for 20 ms in a second, and idle for 1."""
        others = len(pids)
        elapsed = 1.0 + others
        used = tasks * (0.003 if others else 0.001) + elapsed * (0.001 + 0.021 * others)
        return SimpleNamespace(used={"store": used, "own": 0.0}, elapsed=elapsed)

    def nodes(place, count):
        return nullcontext({str(number): number for number in range(count)})

    monkeypatch.setattr(operations.Place, "nodes", nodes)
    for name, kind in scale.KINDS.items():
        place = operations.Place(None, 0, str(tmp_path / name), ("", 0))
        (tmp_path / name).mkdir()
        found = operations.with_others(place, 10, Cost(0.0, 0.001), kind.others, run)
        costs = [found.alone.store, found.beside.store, found.watching.store]
        assert costs == pytest.approx([0.001, 0.003, 0.020])


def test_the_time_of_children_is_metered(on_path):
    """Also that of a child of a child, and of one that has ended."""
    from benchmarks import children
    from benchmarks.metering import Meter, seconds_of

    spin = "import time\nwhile time.process_time() < 0.2: pass"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
    program += f"\n{spin}\nprint('done', flush=True)\nsys.stdin.read()"
    with children.talking("-c", program) as child:
        with Meter(child=child.pid) as meter:
            child.hear("done")
        assert 0.35 < seconds_of(child.pid) < 2
    assert 0.2 < meter.used["child"] < 2
    assert meter.elapsed >= 0.2


def test_engines_are_measured():
    ran = run("benchmarks.engines", "--tasks", "20", "--rounds", "1", "--only", "threads")
    head, row, _, _ = ran.splitlines()
    figures = row.removeprefix("Threads, TaskX").split()
    assert len(figures) == len(re.split(r"\s{2,}", head.strip()))
    assert 1 < float(figures[-1]) < 5  # commits: one for each submit; outcomes may share them


def run(*args: str) -> str:
    ran = subprocess.run([sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


# --- a disk or a server


DISK = ["sync", "submit", "submit, 8 threads", "submit_many", "run", "start", "two processes"]


def names(printed: str) -> list[str]:
    return [re.split(r"\s{2,}", line)[0] for line in printed.splitlines()[1:]]


def test_a_disk_is_measured_beside_the_users_file_and_nothing_stays_behind(tmp_path):
    file = tmp_path / "tasks.db"
    with taskx.SQLiteRepository(file) as repository:
        taskx.Queue(repository).list_tasks()  # creates the file
    before = sorted(os.listdir(tmp_path)), file.read_bytes()
    assert names(run("benchmarks.disk", f"sqlite:///{file}", "--seconds", "0.6")) == DISK
    assert (sorted(os.listdir(tmp_path)), file.read_bytes()) == before


def test_an_interrupted_measurement_of_a_disk_leaves_nothing_behind(tmp_path):
    program = [sys.executable, "-m", "benchmarks.disk", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(program, cwd=ROOT, text=True, **pipes) as running:
        running.stdout.readline()
        running.stdout.readline()
        running.send_signal(signal.SIGINT)
        _, said = running.communicate()
    assert "KeyboardInterrupt" in said
    assert os.listdir(tmp_path) == []


def test_the_collections_of_a_measurement_are_dropped(mongo_server):
    import pymongo

    place = f"{mongo_server('standalone')}/taskx_measured"
    with pymongo.MongoClient(place) as client:
        database = client.get_default_database()
        database.mine.insert_one({})
        assert names(run("benchmarks.disk", place, "--seconds", "0.6")) == DISK[1:]
        assert database.list_collection_names() == ["mine"]
        client.drop_database(database)
