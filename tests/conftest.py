"""Settings, plugins and fixtures of the whole test suite."""

import signal
from collections.abc import Callable

import kinds
import messages
import mongo_server as servers
import postgres_server as postgres
import pytest
from hypothesis import settings

# Each run uses the same examples and has no deadlines. --hypothesis-profile=random uses other examples.
settings.register_profile("random", deadline=None)
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")

# This must come before the first import of these modules. Their assertions then show details, as in tests.
pytest.register_assert_rewrite("taskx.testing", "helpers")

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fail for parameters in a set: several processes must collect the same tests in the same order."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        if any(isinstance(values, (set, frozenset)) for values in mark.args[1:]):
            name = metafunc.definition.name
            pytest.fail(f"{name}: sort the parameters {mark.args[0]}", pytrace=False)


@pytest.fixture
def mongo_server() -> Callable[[str], str]:
    """Return a function that gives the URL of a shared MongoDB server of a kind: "set" or "standalone"."""
    return servers.shared


@pytest.fixture
def postgres_server() -> postgres.Server:
    """Return a shared PostgreSQL server, on which the test makes a database of its own."""
    return postgres.shared()
