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
from taskx.running.place import Place
from taskx.storage.base import Repository
from taskx.storage.eight import TaskRepository

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
OTHER_TRANSACTIONS = {"submitting/work.py", "executing/transactions.py"}


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
    """``entered``, ``unsettled``, ``retries``, ``turns`` and ``dependents`` are no verbs."""
    verbs = {name for name in dir(Moves) if not name.startswith("_")}
    assert verbs - {"entered", "unsettled"} == {
        *("commit", "later", "conclude", "flush", "follow", "process_if_unattended")
    }


def test_nobody_but_the_door_follows_up_what_the_queue_commits():
    """Others follow up the commits of other transactions: a caller's, and an executor's."""
    assert users("moves.follow") == {"submitting/joining.py", "running/pool.py"}


# Stores


def test_what_a_store_must_do_is_eleven_primitives_and_the_rest_is_in_objects():
    """The rest of the members are the eight methods, what they need, and what says how they are stored."""
    members = {name for name, value in vars(Repository).items() if callable(value)}
    own = {name for name in members if not name.startswith("_")}
    assert len(Repository.__abstractmethods__) == 11
    assert own - Repository.__abstractmethods__ - set(vars(TaskRepository)) == {
        *("get_many", "statuses", "put_note", "nodes", "require", "close"),
        *("refuse_unknown_conditions", "refuse_if_key_held"),
    }


# Ways in


def test_three_functions_take_in_new_tasks():
    """Each reserves places, stores the tasks, and fills the places."""
    fillers = {
        f"{name}: {function.name}"
        for name, tree in modules()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "fill"
    }
    assert fillers == {
        f"submitting/intake.py: {function}" for function in ("accept", "accept_many", "put")
    }


def test_every_place_that_can_be_filled_is_a_kind_of_place():
    kinds = {
        node.name
        for _, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(isinstance(part, ast.FunctionDef) and part.name == "fill" for part in node.body)
    }
    assert kinds == {"Place", *(kind.__name__ for kind in Place.__subclasses__())}
