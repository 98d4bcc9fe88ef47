"""Loading a queue, the limits of a process, changed files, messages to systemd, and the health."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from storage.repositories import TinyRepository

from taskx import ConfigurationError, MemoryRepository, Queue, SQLiteRepository
from taskx.node.ahead import Ahead
from taskx.programs.worker import health
from taskx.programs.worker.health import HealthFile, HealthPort
from taskx.programs.worker.loading import files_of, load_queue, load_queue_to_run
from taskx.programs.worker.notify import Notifier
from taskx.programs.worker.process import (
    MIB,
    Changes,
    Limits,
    Process,
    check_memory,
    check_shared,
    loaded_files,
    memory,
)
from taskx.programs.worker.settings import Settings
from taskx.stores.adapter import EightMethodAdapter
from taskx.tasks.timing import DEFAULT_TIMING

# Loading

GOOD = """
from types import SimpleNamespace
from taskx import MemoryRepository, Queue

queue = Queue(MemoryRepository())
state = SimpleNamespace(queue=queue)
number = 4

def make_queue():
    return Queue(MemoryRepository())

def makes_number():
    return 4

def needs(path):
    return queue

def fails():
    return 1 / 0
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes a module into the working folder, and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text=GOOD):
        name = f"app_{os.urandom(6).hex()}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


@pytest.mark.parametrize("name", ["queue", "make_queue", "state.queue"])
def test_a_queue_is_found_by_its_name_by_a_dotted_name_and_by_a_function(module, name):
    assert isinstance(load_queue(f"{module()}:{name}"), Queue)


@pytest.mark.parametrize("target", ["app", "app:", ":queue", ""])
def test_a_place_without_module_or_name_is_refused(target):
    with pytest.raises(ConfigurationError, match=r"write module:name, such as app:queue"):
        load_queue(target)


def test_a_module_that_does_not_exist_is_named_with_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=f"no module 'missing_app' in {tmp_path}"):
        load_queue("missing_app.tasks:queue")


def test_an_error_of_the_module_is_one_line_with_its_place(module):
    name = module("import os\n\nraise KeyError('several\\nlines')\n")
    with pytest.raises(ConfigurationError) as info:
        load_queue(f"{name}:queue")
    words = str(info.value)
    assert "\n" not in words
    assert f"module '{name}' cannot be imported: KeyError: " in words
    assert f"{name}.py, line 3)" in words
    assert any(file.endswith(f"{name}.py") for file in files_of(info.value))


def test_a_missing_module_that_the_module_imports_is_an_error_of_the_module(module):
    name = module("import surely_not_installed\n")
    with pytest.raises(ConfigurationError, match=rf"'{name}' cannot be imported: ModuleNotFound"):
        load_queue(f"{name}:queue")


STARTS = """
from taskx import MemoryRepository, Queue

queue = Queue(MemoryRepository())
queue.declare("email")
queue.submit("email")
{}

def make_queue():
    made = Queue(MemoryRepository())
    made.start()
    return made
"""


@pytest.mark.parametrize(
    ("text", "name", "line", "code"),
    [
        ("queue.start()", "queue", 7, "queue.start()"),
        ("with queue:\n    queue.drain()", "queue", 7, "with queue:"),
        ("", "make_queue", 11, "made.start()"),
    ],
)
def test_a_program_that_starts_a_queue_itself_is_refused_with_the_line(
    module, text, name, line, code
):
    app = module(STARTS.format(text))
    with pytest.raises(ConfigurationError) as refused:
        load_queue_to_run(f"{app}:{name}")
    file = sys.modules[app].__file__ if app in sys.modules else os.path.abspath(f"{app}.py")
    assert str(refused.value) == (
        f"{file}:{line}: {code} — the worker starts the queue itself; remove this line, or put it "
        "under if __name__ == '__main__':"
    )
    assert any(found == file for found in files_of(refused.value))


def test_a_queue_that_was_loaded_can_be_started(module):
    queue = load_queue_to_run(f"{module(STARTS.format(''))}:queue")
    queue.start()
    assert queue.stop() == []


def test_a_module_that_exits_is_an_error_and_does_not_end_the_program(module):
    with pytest.raises(ConfigurationError, match=r"cannot be imported: SystemExit: 3"):
        load_queue(f"{module('raise SystemExit(3)')}:queue")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qeue", "did you mean 'queue'"),
        ("number", "is an object of the type int"),
        ("makes_number", "returns an object of the type int"),
        ("needs", "cannot be called without arguments: TypeError"),
        ("fails", "fails' raised an error: ZeroDivisionError"),
        ("state.nothing", "did you mean 'queue'"),
    ],
)
def test_a_name_that_is_no_queue_is_refused_with_a_hint(module, name, words):
    with pytest.raises(ConfigurationError, match=words):
        load_queue(f"{module()}:{name}")


# Settings and limits


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": "app"},
        {"processes": 0},
        {"threads": 0},
        {"stop_timeout": -1},
        {"max_tasks": 0},
        {"max_memory": 5},
        {"max_age": 0},
        {"health_port": 65536},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ConfigurationError):
        Settings(**{"target": "app:queue", **wrong})


def reached(settings, facts, share):
    limits = Limits(Settings(target="app:queue", **settings), lambda: share)
    return limits.reached({"attempts": 0, "memory": 0, "age": 0, **facts})


@pytest.mark.parametrize(
    ("limit", "value", "fact", "words"),
    [
        ("max_tasks", 1000, "attempts", "it has run 1000 tasks"),
        ("max_memory", 1000 << 20, "memory", "it takes 1000 MiB"),
        ("max_age", 1000, "age", "it is 1000 s old"),
    ],
)
def test_a_process_is_replaced_between_four_fifths_of_its_limit_and_the_limit(
    limit, value, fact, words
):
    assert reached({limit: value}, {fact: value}, 0.0) == words
    assert reached({limit: value}, {fact: value * 99 // 100}, 0.0) == ""
    assert reached({limit: value}, {fact: value * 81 // 100}, 1.0) != ""
    assert reached({limit: value}, {fact: value * 79 // 100}, 1.0) == ""


def test_attempts_are_told_only_if_they_are_limited():
    ahead = Ahead(1, DEFAULT_TIMING)
    pool = SimpleNamespace(ahead=ahead)
    assert "attempts" not in Limits(Settings(target="app:queue")).facts(pool)
    limits = Limits(Settings(target="app:queue", max_tasks=10))
    assert limits.facts(pool)["attempts"] == 0
    ahead.ended("a", 0.1)
    ahead.ended("b", 0.1)
    assert limits.facts(pool)["attempts"] == 2


def test_a_process_that_is_told_to_stop_before_its_first_beat_still_says_that_it_has_started():
    """The supervisor counts a task that is left behind only if the queue had started."""
    said = []
    process = Process(
        SimpleNamespace(
            hear=lambda timeout: orders.pop(), say=lambda *m: said.append(m), unsent=False
        ),
        Settings(target="app:queue"),
    )
    process._queue = SimpleNamespace(healthy=True, repository=MemoryRepository())
    pool = SimpleNamespace(ahead=SimpleNamespace(at_work=["a task"]))
    process._node = SimpleNamespace(pool=pool, problems=list, name="stopped", stops=True)
    # The channel is closed in the end, which stops the process a second time at most.
    orders = [None, [["stop"]]]
    process._attend()
    assert [kind for kind, *_ in said] == ["beat"]
    assert said[0][1]["running"] == 1


def test_a_limit_of_memory_that_a_process_reaches_without_tasks_is_refused():
    check_memory(None, 90 * MIB)
    check_memory(120 * MIB, 90 * MIB)
    with pytest.raises(ConfigurationError, match=r"takes 90 MiB .* must be at least 113M"):
        check_memory(112 * MIB, 90 * MIB)
    check_memory(113 * MIB, 90 * MIB)


def test_several_processes_are_refused_on_a_repository_that_is_for_one(tmp_path):
    check_shared(2, SQLiteRepository(tmp_path / "tasks.db"))
    check_shared(1, MemoryRepository())
    with pytest.raises(ConfigurationError, match=r"MemoryRepository is for one process, .* is 2"):
        check_shared(2, MemoryRepository())
    with pytest.raises(ConfigurationError, match=r"TinyRepository is for one process, .* is 3"):
        check_shared(3, EightMethodAdapter(TinyRepository()))


def test_the_memory_of_this_process_is_plausible():
    assert 5 << 20 < memory() < 100 << 30


def test_a_file_has_changed_if_its_time_differs_or_it_is_gone(tmp_path):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.touch()
    other.touch()
    changes = Changes(lambda: [str(one), str(other)])
    assert changes.next() == ""
    assert changes.next() == ""
    os.utime(other, ns=(1, 1))
    assert changes.next() == str(other)
    fresh = Changes(lambda: [str(one)])
    assert fresh.next() == ""
    one.unlink()
    assert fresh.next() == str(one)


def test_a_file_that_changes_while_it_is_imported_has_changed(module, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    name = module("import os\nos.utime(__file__, ns=(1, 1))\nraise ValueError")
    changes = Changes(list)
    changes.watch()
    with pytest.raises(ConfigurationError) as info:
        load_queue(f"{name}:queue")
    changes.wait({*files_of(info.value)})  # it returns


def test_a_file_that_the_program_writes_before_it_imports_it_has_not_changed(
    module, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    made = module("version = 1")
    write = f"import pathlib\npathlib.Path('{made}.py').write_text('version = 22')\nimport {made}\n"
    changes = Changes(lambda: [file for file in loaded_files() if file.startswith(str(tmp_path))])
    changes.watch()
    load_queue(f"{module(write + GOOD)}:queue")
    changes.note(loaded_files())
    assert sys.modules[made].version == 22
    assert changes.next() == ""


def test_a_file_of_another_size_has_changed_even_if_its_time_is_the_same(tmp_path):
    file = tmp_path / "one.py"
    file.touch()
    os.utime(file, ns=(1, 1))
    changes = Changes(lambda: [str(file)])
    assert changes.next() == ""
    file.write_text("1")
    os.utime(file, ns=(1, 1))
    assert changes.next() == str(file)


def test_a_lazy_module_that_raises_does_not_stop_the_watch(monkeypatch):
    class Lazy:
        def __getattr__(self, name):
            raise ImportError("not installed")

    monkeypatch.setitem(sys.modules, "lazy_one", Lazy())
    assert __file__ in loaded_files()


# systemd


def test_the_service_manager_hears_each_state_and_the_children_have_no_socket(manager):
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "30000000", "HOME": "/"}
    notifier = Notifier(environment)
    assert environment == {"HOME": "/"}
    assert notifier.watchdog == 15.0
    notifier.ready()
    notifier.status("ok")
    notifier.status("ok")
    notifier.beat()
    notifier.reloading()
    notifier.stopping()
    heard = [manager.read() for _ in range(5)]
    assert heard[:3] == ["READY=1", "STATUS=ok", "WATCHDOG=1"]
    assert heard[3].startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert heard[4] == "STOPPING=1"
    notifier.close()


def test_a_service_manager_that_reads_late_hears_the_last_message_of_each_kind(manager):
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    for number in range(1000):  # more than the socket has room for
        notifier.status(f"{number}")
    notifier.ready()
    notifier.status("last")
    while manager.read() != "READY=1":
        notifier.flush()
    notifier.flush()
    assert manager.read() == "STATUS=last"
    notifier.close()


def test_a_watchdog_of_another_process_and_a_missing_manager_are_ignored():
    environment = {
        "NOTIFY_SOCKET": "/nowhere/at/all",
        "WATCHDOG_USEC": "1000000",
        "WATCHDOG_PID": str(os.getpid() + 1),
    }
    notifier = Notifier(environment)
    assert notifier.watchdog is None
    notifier.ready()
    notifier.close()


# The health

GOOD_REPORT = {"ok": True, "live": True, "ready": True, "problems": []}
BAD_REPORT = {"ok": False, "live": True, "ready": True, "problems": ["The repository is away."]}


def test_the_health_file_exists_and_is_renewed_while_all_is_well(tmp_path):
    path = tmp_path / "health"
    path.write_text("left by a supervisor that was killed")
    file = HealthFile(str(path))
    assert not path.exists()
    file.show(GOOD_REPORT, 100.0)
    assert json.loads(path.read_text()) == GOOD_REPORT
    os.utime(path, ns=(1, 1))
    file.show(GOOD_REPORT, 100.0 + DEFAULT_TIMING.health_every - 1)
    assert path.stat().st_mtime_ns == 1
    file.show(GOOD_REPORT, 100.0 + DEFAULT_TIMING.health_every)
    assert path.stat().st_mtime_ns > 1
    file.show(BAD_REPORT, 106.0)
    assert not path.exists()
    file.show(GOOD_REPORT, 107.0)
    assert path.exists()
    file.close()
    assert list(tmp_path.iterdir()) == []


def test_a_health_file_in_a_missing_folder_is_refused_at_once(tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"health file .*/health cannot be written: No such"
    ):
        HealthFile(str(tmp_path / "missing" / "health"))


def asked(url):
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def loopbacks():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:  # a host without IPv6
        return ["127.0.0.1"]
    return ["127.0.0.1", "::1"]


@pytest.mark.parametrize("host", loopbacks())
def test_the_health_port_answers_with_200_or_503_and_the_report(host):
    state = [GOOD_REPORT, 0]  # the report, and its age in seconds
    port = HealthPort(host, 0, lambda: (state[0], time.monotonic() - state[1]))
    try:
        assert asked(f"{port.url}/health") == (200, GOOD_REPORT)
        assert asked(f"{port.url}/ready?verbose") == (200, GOOD_REPORT)
        assert asked(f"{port.url}/other")[0] == 404
        state[0] = BAD_REPORT
        assert asked(f"{port.url}/health") == (503, BAD_REPORT)
        assert asked(f"{port.url}/ready")[0] == asked(f"{port.url}/live")[0] == 200
        state[:] = GOOD_REPORT, 60
        status, report = asked(f"{port.url}/health")
        assert (status, report["ok"], report["error"]) == (503, False, "the supervisor hangs")
    finally:
        port.close()


def test_a_hundred_probes_at_once_are_all_answered():
    """None is accepted before all have connected: the kernel keeps them."""
    report = staticmethod(lambda: (GOOD_REPORT, time.monotonic()))
    server = health._Server(
        ("127.0.0.1", 0), type("Handler", (health._Handler,), {"report": report})
    )
    with ExitStack() as stack:
        stack.callback(server.server_close)
        probes = [
            stack.enter_context(socket.create_connection(server.server_address, timeout=60))
            for _ in range(100)
        ]
        for probe in probes:
            probe.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            answers = [probe.makefile("rb").readline() for probe in probes]
        finally:
            server.shutdown()
            thread.join()
    assert {answer.split()[1] for answer in answers} == {b"200"}


def test_a_health_port_that_is_taken_is_refused_with_its_number():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1 port {number}"):
            HealthPort("127.0.0.1", number, lambda: (GOOD_REPORT, 0.0))
