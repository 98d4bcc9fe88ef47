"""The structure of the package, counted: each number says how many ways there are to do one thing.

A number may fall. If it must rise, say why where it is counted.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import taskx
from taskx.common.ledger import Ledger
from taskx.moving import Moves

PACKAGE = Path(taskx.__file__).parent

#: The modules that make a repository: they implement ``apply``, or pass writes on to another repository.
STORES = ("storage/", "liveness/", "contrib/django/", "repository/")
#: The test kit looks at a repository from outside, as a program does.
KIT = ("testing/",)


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield each module of the package: its path inside, and its syntax tree."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text("utf-8"))


def users(end: str, *, outside: tuple[str, ...] = ()) -> set[str]:
    """Return the modules with an attribute that ends so, without those whose path begins as given."""
    return {
        name
        for name, tree in modules()
        if not name.startswith(outside)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).endswith(end)
    }


def importers(module: str) -> set[str]:
    """Return the modules that import from a module."""
    return {
        name
        for name, tree in modules()
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and node.module == module)
        or (isinstance(node, ast.Import) and module in [alias.name for alias in node.names])
    }


# Doors for writes


#: The modules that hand moves to a repository inside a transaction that is not the queue's: the caller's,
#: or the executor's. They have no group commit, and the consequences follow when the commit is seen.
OTHER_TRANSACTIONS = {"submitting/joining.py", "executing/transactions.py"}


def test_doors_for_writes_are_one():
    """No module above the storage hands moves to the repository, but the door."""
    doors = users(".apply", outside=STORES + KIT) - OTHER_TRANSACTIONS
    assert doors == {"common/ledger.py"}


def test_nobody_but_the_door_knows_the_ledger():
    assert importers("taskx.common.ledger") == {"moving.py"}
    assert [kind for kind in Ledger.__subclasses__() if kind.__module__.startswith("taskx")] == [
        Moves
    ]


def test_the_door_has_few_verbs():
    """``entered`` and ``unsettled`` are no verbs, and ``serve`` names the node to be told."""
    verbs = {name for name in dir(Moves) if not name.startswith("_")}
    assert verbs - {"entered", "unsettled", "serve"} == {
        *("commit", "later", "conclude", "flush", "follow", "process_if_unattended")
    }


def test_nobody_but_the_door_follows_up_what_the_queue_commits():
    """Others follow up the commits of other transactions: a caller's, and an executor's."""
    assert users("moves.follow") == {"submitting/joining.py", "running/pool.py"}
