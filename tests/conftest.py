"""Settings, plugins and fixtures of the whole test suite."""

import importlib.util
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import kinds
import messages
import mongo_server as servers
import postgres_server as postgres
import pytest
from hypothesis import settings

from taskx.tasks import ids

# An environment without the interpreter's lock lacks what has no wheel for it, and Playwright, which
# switches the lock on.
_NEED = {"playwright": "dashboard/browser", "psycopg": "storage/postgres"}
collect_ignore = [
    folder for package, folder in _NEED.items() if not importlib.util.find_spec(package)
]

# Each run uses the same examples and has no deadlines. --hypothesis-profile=random uses other examples.
settings.register_profile("random", deadline=None)
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")

# This must come before the first import of these modules. Their assertions then show details, as in tests.
pytest.register_assert_rewrite("taskx.testing", "helpers", "units")

# Tests that a shell started in the background ignore Ctrl-C. All programs that they start would ignore
# it, too, but some tests interrupt such programs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    messages.pytest_addoption(parser)


def pytest_configure(config: pytest.Config) -> None:
    messages.pytest_configure(config)
    config.pluginmanager.register(kinds)
    config.pluginmanager.import_plugin("helpers")
    if not config.pluginmanager.has_plugin("taskx"):  # in a tree that is not installed
        config.pluginmanager.import_plugin("pytest_taskx")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Have each process import another part of the tests first: so each module is compiled once.

    Pytest compiles a new or changed test module and stores the code. Processes that import the same modules
    in the same order would all compile all of them.
    """
    report = yield
    if isinstance(collector, (pytest.Session, pytest.Directory)):
        count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
        number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        first = len(report.result) * number // count
        report.result = [*report.result[first:], *report.result[:first]]
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the tests into the order of their files again: it is the same in all processes."""
    items.sort(key=lambda item: item.path)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fail for parameters in a set: several processes must collect the same tests in the same order."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        if any(isinstance(values, (set, frozenset)) for values in mark.args[1:]):
            name = metafunc.definition.name
            pytest.fail(f"{name}: sort the parameters {mark.args[0]}", pytrace=False)


#: A file system in memory. A sync of a disk takes longer than most tests.
MEMORY = Path("/dev/shm")
#: The free bytes that it must have; containers often give it 64 MiB.
ROOM = 512 << 20


@pytest.fixture(autouse=True)
def ids_in_order() -> None:
    """No test is the one in which the counter of ids begins anew: keys of one moment keep their order."""
    ids._counted &= ids._FULL >> 1
    # Else it would seem to have begun anew where tests share a moment.
    ids._keyed, ids._latest = -1, ids._NEVER


@pytest.fixture(scope="session")
def folders_in_memory() -> Iterator[Iterator[Path] | None]:
    """New folders in memory; None without room, and if TMPDIR says where files belong."""
    if "TMPDIR" in os.environ or not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < ROOM:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="taskx-", dir=MEMORY) as root:
        yield (Path(root, str(number)) for number in itertools.count())


@pytest.fixture
def tmp_path(
    request: pytest.FixtureRequest, folders_in_memory: Iterator[Path] | None
) -> Iterator[Path]:
    """A folder: in memory for a quick test, on the disk if processes die or it is about the stores."""
    on_disk = kinds.kind_of(request.node) or kinds.TESTS / "storage" in request.path.parents
    if on_disk or folders_in_memory is None:
        yield request.getfixturevalue("tmp_path")  # pytest's own
        return
    folder = next(folders_in_memory)
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def mongo_server() -> Callable[[str], str]:
    """Return a function that gives the URL of a shared MongoDB server of a kind: "set" or "standalone"."""
    return servers.shared


@pytest.fixture
def postgres_server() -> postgres.Server:
    """Return a shared PostgreSQL server, on which the test makes a database of its own."""
    return postgres.shared()
