"""What the whole suite shares."""

import signal
from collections.abc import Callable

import kinds
import messages
import mongo_server as servers
import pytest
from hypothesis import settings

# The same examples at each run, however slow the machine; others with --hypothesis-profile=random.
settings.register_profile("random", deadline=None)
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")

# Before anything imports them: their assertions then explain themselves as those of a test do.
pytest.register_assert_rewrite("taskx.testing", "helpers")

# Where a shell started the tests in the background, they ignore Ctrl-C, and so would all programs
# that they start and interrupt.
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
    """Refuse parameters in no order: several processes must collect the same tests."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        if any(isinstance(values, (set, frozenset)) for values in mark.args[1:]):
            name = metafunc.definition.name
            pytest.fail(f"{name}: sort the parameters {mark.args[0]}", pytrace=False)


@pytest.fixture
def mongo_server() -> Callable[[str], str]:
    """Gives the URL of a shared MongoDB server of a kind, "set" or "standalone"."""
    return servers.shared
