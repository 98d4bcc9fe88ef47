"""Supervisors in processes of their own: signals, deaths, new code, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers import eventually
from mongo_server import free_port

from taskx import Queue, SQLiteRepository, TaskStatus

PROGRAM = """
import json, os, sys
from functools import partial
from taskx.programs.worker import supervisor
from taskx.programs.worker.settings import Settings
from taskx.tasks.timing import Timing

# A process on a slow machine must not look like one that hangs.
slow = Timing(end_within=60, report_within=60, probe_within=60)
supervisor.Supervisor = partial(supervisor.Supervisor, timing=slow)
os.chdir(sys.argv[1])
sys.exit(supervisor.supervise(Settings(**json.loads(sys.argv[2]))))
"""

# An executor notes its process and waits until the test creates a file.
APP = """
import os, pathlib, subprocess, time
from taskx import Config, Queue, SQLiteRepository

queue = Queue(SQLiteRepository("tasks.db"), Config(worker_num=2))
VERSION = 1

def note(*words):
    log = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, (" ".join(map(str, words)) + "\\n").encode())
    os.close(log)

@queue.executor()
def hold(key):
    note(key, os.getpid())
    while not pathlib.Path(key).exists():
        time.sleep(0.01)  # blocks on purpose
    return VERSION

def start_programs():
    child = subprocess.Popen(["sleep", "600"])
    session = subprocess.Popen(["sleep", "600"], start_new_session=True)
    detached = ["sh", "-c", "setsid sleep 600 > /dev/null & echo $!"]
    note("programs", child.pid, session.pid, subprocess.check_output(detached, text=True).strip())
    child.wait()

@queue.executor(max_crashes=9)
def program():
    start_programs()

@queue.executor(isolation="process")
def isolated():
    start_programs()

@queue.executor()
def fine():
    return os.getpid()
"""


class Worker:
    """A supervisor of the app in a folder, and the repository of its tasks."""

    def __init__(self, spawn, folder: Path, **settings):
        self.folder = folder
        self.repository = SQLiteRepository(folder / "tasks.db")
        self.queue = Queue(self.repository)
        self.queue.declare("hold", "fine", "program", "isolated")
        (folder / "app.py").write_text(settings.pop("app", APP))
        (folder / "log").touch()
        first = settings.pop("first", "")
        settings = {"target": "app:queue", "processes": 2, **settings}
        self.child = spawn(first + PROGRAM, folder, json.dumps(settings))

    def nodes(self):
        return [node for node in self.repository.nodes() if node.alive]

    def starts(self, count):
        """Wait until this number of live nodes have started."""
        eventually(lambda: len(self.nodes()) == count)

    def runs(self, key):
        """Return the processes that have run a task that waits for the file ``key``."""
        return [pid for pid, *_ in self.logged(key)]

    def logged(self, key):
        """Return the numbers in each line of the log that begins with this word."""
        lines = [line.split() for line in (self.folder / "log").read_text().splitlines()]
        return [[int(number) for number in numbers] for word, *numbers in lines if word == key]

    def programs(self, count):
        """Wait until the programs of tasks have started this many times; return those of each time."""
        return eventually(lambda: len(found := self.logged("programs")) == count and found)

    def hold(self, key, *, count=1):
        """Submit a task that waits for a file, and wait until it runs; return the process."""
        self.queue.submit("hold", {"key": key}, id=key)
        return eventually(lambda: len(self.runs(key)) == count and self.runs(key)[-1])

    def release(self, key):
        (self.folder / key).touch()

    def task(self, key):
        return self.repository.get_by_id(key)

    def ends(self):
        """Wait until the supervisor ends; return its exit code and what it logged."""
        _, errors = self.child.ends()
        assert "Traceback" not in errors, errors
        return self.child.process.returncode, errors

    def stop(self):
        self.child.signal(signal.SIGTERM)
        return self.ends()


@pytest.fixture
def worker(spawn, tmp_path, monkeypatch):
    """Return a function that starts a supervisor with these settings."""
    # Python takes a file for unchanged that is written twice within a second, with the same size.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    made = []

    def start(**settings):
        made.append(Worker(spawn, tmp_path, **settings))
        return made[-1]

    yield start
    for one in made:
        one.queue.close()


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def asked(port, path="health"):
    """Return the status and the report of the health port; (0, {}) if it does not answer in time."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
    except OSError:
        return 0, {}


def test_a_killed_process_is_replaced_and_its_task_runs_again(worker):
    port = free_port()
    one = worker(health_port=port, health_file="health")
    one.starts(2)
    pid = one.hold("x")
    eventually((one.folder / "health").exists)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(one.runs("x")) == 2)
    assert one.runs("x")[1] != pid
    one.release("x")
    assert one.queue.handle("x").result(timeout=60) == 1
    assert one.task("x").crashes == 1
    one.starts(2)

    def states():
        return [process["state"] for process in asked(port)[1].get("processes", ())]

    eventually(lambda: states() == ["ready", "ready"])
    assert one.stop()[0] == 0
    assert not (one.folder / "health").exists()
    assert one.nodes() == []


def test_a_worker_is_not_healthy_while_its_file_is_away(worker):
    port = free_port()
    one = worker(health_port=port, processes=1)

    def problems():
        return asked(port)[1].get("problems")

    # A start is not a problem, so /health is no sign.
    eventually(lambda: asked(port, "ready")[0] == 200)
    eventually(lambda: problems() == [])
    file, kept = one.folder / "tasks.db", one.folder / "kept.db"
    file.rename(kept)
    away = r"The repository cannot be used: .* was moved or deleted"
    eventually(lambda: any(re.search(away, one) for one in (problems() or ())))
    assert asked(port)[0] == 503
    eventually(lambda: len(problems() or ()) == 2)
    eventually(lambda: asked(port, "live")[0] == 503)  # another process would make a new file
    kept.rename(file)
    eventually(lambda: problems() == [])
    eventually(lambda: asked(port, "live")[0] == 200)


def test_the_programs_of_tasks_end_with_a_process_that_is_killed_or_leaves_them(worker):
    one = worker(processes=1, health_file="health", stop_timeout=0.5)
    eventually((one.folder / "health").exists)
    one.queue.submit("program")
    [programs] = one.programs(1)
    pid = int(one.nodes()[0].name.split(":")[1])
    os.kill(pid, signal.SIGKILL)
    _, again = one.programs(2)
    eventually(lambda: not any(map(is_alive, programs)))
    assert one.stop()[0] == 1  # the task still runs
    eventually(lambda: not any(map(is_alive, again)))


@pytest.mark.parametrize("type", ["program", "isolated"])
def test_a_task_starts_again_after_the_programs_of_a_worker_whose_supervisor_was_killed(
    worker, type
):
    one = worker(processes=1, stop_timeout=0.5)
    one.starts(1)
    handle = one.queue.submit(type)
    one.programs(1)
    other = worker(processes=1, stop_timeout=0.5)
    other.starts(2)
    one.child.kill()
    programs, _ = one.programs(2)
    eventually(lambda: not any(map(is_alive, programs)))  # a killed one may need a moment to end
    assert handle.task().starts == 2
    assert other.stop()[0] == 1


def test_a_task_starts_again_after_the_programs_of_a_process_that_is_replaced(worker):
    one = worker(processes=1, stop_timeout=0.5, max_tasks=1)
    one.starts(1)
    one.queue.submit("program")
    one.programs(1)
    one.queue.submit("fine")
    programs, _ = one.programs(2)
    eventually(lambda: not any(map(is_alive, programs)))
    assert one.stop()[0] == 1


def test_sighup_brings_new_code_and_running_tasks_end_with_the_old(worker, manager, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    one = worker()
    eventually(lambda: manager.read() == "READY=1")
    old = one.hold("old")
    (one.folder / "app.py").write_text(APP.replace("VERSION = 1", "VERSION = 2  # another size"))
    one.child.signal(signal.SIGHUP)
    eventually(lambda: manager.read().startswith("RELOADING=1"))
    eventually(lambda: manager.read() == "READY=1")
    eventually(lambda: len([node for node in one.nodes() if not node.stopping]) == 2)
    assert is_alive(old)  # but it takes no more tasks
    assert one.hold("new") != old
    one.release("old")
    one.release("new")
    assert one.queue.handle("new").result(timeout=60) == 2
    assert one.queue.handle("old").result(timeout=60) == 1
    assert (one.task("old").starts, one.task("new").starts) == (1, 1)
    one.child.signal(signal.SIGTERM)
    eventually(lambda: manager.read() == "STOPPING=1")
    assert one.ends()[0] == 0


def test_sigterm_lets_running_tasks_end(worker):
    one = worker()
    one.starts(2)
    one.hold("x")
    one.child.signal(signal.SIGTERM)
    eventually(lambda: all(node.stopping for node in one.nodes()))
    one.release("x")
    assert one.ends()[0] == 0
    task = one.task("x")
    assert (task.status, task.starts) == (TaskStatus.COMPLETED, 1)


def test_ctrl_c_is_not_for_a_worker_in_the_background(worker):
    background = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    one = worker(processes=1, first=background, health_file="health")
    eventually((one.folder / "health").exists)
    one.child.signal(signal.SIGINT)
    code, errors = one.stop()
    assert (code, "SIGINT" in errors) == (0, False)


def test_a_second_signal_ends_at_once_and_the_task_is_only_interrupted(worker):
    one = worker(processes=1, stop_timeout=600)
    one.starts(1)
    pid = one.hold("x")
    one.child.signal(signal.SIGTERM)
    eventually(lambda: all(node.stopping for node in one.nodes()))
    one.child.signal(signal.SIGTERM)
    assert one.ends()[0] == 128 + signal.SIGTERM
    assert not is_alive(pid)
    other = worker(processes=1)
    eventually(lambda: len(other.runs("x")) == 2)
    other.release("x")
    assert other.queue.handle("x").result(timeout=60) == 1
    assert (other.task("x").interruptions, other.task("x").crashes) == (1, 0)
    assert other.stop()[0] == 0


def test_the_processes_drain_and_end_when_the_supervisor_is_killed(worker):
    one = worker()
    one.starts(2)
    one.hold("x")
    pids = [int(node.name.split(":")[1]) for node in one.nodes()]
    one.child.kill()
    eventually(lambda: all(node.stopping for node in one.nodes()))
    one.release("x")
    eventually(lambda: not any(map(is_alive, pids)))
    task = one.task("x")
    assert (task.status, task.starts, task.result) == (TaskStatus.COMPLETED, 1, 1)
    assert one.nodes() == []


def test_a_process_is_replaced_after_its_number_of_tasks_and_none_is_lost(worker):
    one = worker(processes=1, max_tasks=10)
    one.starts(1)
    first = one.queue.submit("fine").result(timeout=60)
    eventually(lambda: one.queue.submit("fine").result(timeout=60) != first)
    eventually(lambda: not is_alive(first))
    code, errors = one.stop()
    assert code == 0
    assert re.search(r"is replaced: it has run \d+ tasks", errors)
    assert "has ended with exit code 75" in errors


@pytest.mark.parametrize(
    ("app", "code", "words"),
    [
        ("queue = 4", 2, "is not a queue"),
        (f"{APP}\nqueue.start()\n", 2, ": queue.start() — the worker starts the queue itself"),
        ("import os\nos.environ['SURELY_NOT_SET']", 2, "KeyError: 'SURELY_NOT_SET' ("),
        (APP.replace("tasks.db", "missing/folder/tasks.db"), 5, "cannot be opened"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", 1, "was killed by SIGKILL"),
    ],
)
def test_a_worker_that_cannot_start_says_why_in_one_line_and_ends(worker, app, code, words):
    found, errors = worker(app=app, processes=1).ends()
    assert found == code
    (line,) = [line for line in errors.splitlines() if " ERROR " in line]
    assert words in line
    assert line.endswith(": the worker ends")


def test_a_worker_whose_limit_of_memory_allows_no_task_ends(worker):
    code, errors = worker(processes=1, max_memory=8 << 20).ends()
    assert code == 2
    assert "--max-memory must be at least" in errors


def test_a_process_that_is_still_being_loaded_stops_at_once(worker):
    app = "import pathlib, time\npathlib.Path('loading').touch()\ntime.sleep(600)\n"
    one = worker(processes=1, app=app)
    eventually((one.folder / "loading").exists)
    assert one.stop()[0] == 0


def test_reload_waits_for_a_correction_and_follows_later_changes(worker):
    port = free_port()
    one = worker(processes=1, reload=True, app="def broken(:\n", health_port=port)
    eventually(lambda: "SyntaxError" in str(asked(port)[1].get("problems")))
    app = one.folder / "app.py"
    app.write_text(APP)
    one.starts(1)
    first = one.queue.submit("fine").result(timeout=60)
    app.write_text(APP + "\n# a change\n")
    eventually(lambda: one.nodes() and not is_alive(first))
    assert one.queue.submit("fine").result(timeout=60) != first
    assert one.stop()[0] == 0


@pytest.mark.parametrize("then", ["raise ValueError", APP])
def test_reload_notices_a_change_in_the_middle_of_an_import(worker, tmp_path, then):
    """The program has other code than its file, whether it could be imported or not."""
    (tmp_path / "new").write_text(APP.replace("VERSION = 1", "VERSION = 2  # another size"))
    change = "import pathlib\npathlib.Path(__file__).write_text(pathlib.Path('new').read_text())\n"
    one = worker(processes=1, reload=True, app=change + then)
    one.release("x")
    eventually(lambda: one.queue.submit("hold", {"key": "x"}).result(timeout=60) == 2)
    assert one.stop()[0] == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has subreapers")
def test_a_supervisor_reaps_the_orphans_that_it_adopts(worker):
    # As process 1 of a container, it becomes the parent of each orphan.
    adopt = "import ctypes\nctypes.CDLL(None).prctl(36, 1, 0, 0, 0)\n"
    orphan = "\nimport subprocess\nsubprocess.run(['sh', '-c', 'true & echo $! > orphan'])\n"
    one = worker(processes=1, first=adopt, app=APP + orphan)
    one.starts(1)
    pid = int((one.folder / "orphan").read_text())
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert one.stop()[0] == 0


# The repository is for one process; each has a task that waits for a file.
ALONE = APP.replace("SQLiteRepository", "MemoryRepository").replace('"tasks.db"', "")
ALONE += """
note("loaded", os.getpid())
queue.submit("hold", {"key": "x"})
"""


def test_a_worker_refuses_several_processes_on_a_repository_that_is_for_one(worker):
    one = worker(processes=2, app=ALONE)
    code, errors = one.ends()
    assert code == 2
    assert "MemoryRepository is for one process, and --processes is 2" in errors
    assert one.runs("x") == []


def test_a_process_on_a_repository_that_is_for_one_ends_before_the_next_one_starts(worker):
    port = free_port()
    one = worker(processes=1, app=ALONE, health_port=port)
    (old,) = eventually(lambda: one.runs("x"))
    eventually(lambda: asked(port, "ready")[0] == 200)
    one.child.signal(signal.SIGHUP)
    eventually(lambda: [p["state"] for p in asked(port)[1]["processes"]] == ["leaving"])
    assert one.logged("loaded") == [[old]]
    one.release("x")
    eventually(lambda: len(one.runs("x")) == 2)
    assert not is_alive(old)
    assert one.stop()[0] == 0
