"""The structure of the package, counted: each number says how many ways there are to do one thing.

A number may fall. If it must rise, say why where it is counted.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers import PATIENCE

import taskx
from taskx.node.ledger import Ledger
from taskx.node.moving import Moves
from taskx.node.place import Place
from taskx.stores.base import Repository
from taskx.stores.eight import TaskRepository

PACKAGE = Path(taskx.__file__).parent

#: The modules that make a repository: they implement ``apply``, or pass writes on to another repository.
STORES = ("stores/", "contrib/django/", "repository/")
#: The test kit looks at a repository from outside, as a program does.
KIT = ("testing/",)


@cache
def modules() -> list[tuple[str, ast.Module]]:
    """Return each module of the package: its path inside, and its syntax tree."""
    return [
        (path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text("utf-8")))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


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
OTHER_TRANSACTIONS = {"queue/inside.py", "attempt/transactions.py"}


def test_doors_for_writes_are_one():
    """No module above the storage hands moves to the repository, but the door."""
    doors = users(".apply", outside=STORES + KIT) - OTHER_TRANSACTIONS
    assert doors == {"node/ledger.py"}


def test_nobody_but_the_door_knows_the_ledger():
    assert importers("taskx.node.ledger") == {"node/moving.py"}
    assert [kind for kind in Ledger.__subclasses__() if kind.__module__.startswith("taskx")] == [
        Moves
    ]


def test_the_door_has_few_verbs():
    """Some names are no verbs; ``after`` calls, ``serve`` names a node to tell, ``started`` counts."""
    verbs = {name for name in dir(Moves) if not name.startswith("_")}
    assert verbs - {"entered", "inside", "unsettled", "after", "serve", "started"} == {
        *("commit", "later", "conclude", "flush", "follow", "process_if_unattended")
    }


def test_nobody_but_the_door_follows_up_what_the_queue_commits():
    """Others follow up the commits of other transactions: a caller's, and an executor's."""
    assert users("moves.follow") == {"queue/joining.py", "node/pool.py"}


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
        f"queue/intake.py: {function}" for function in ("_take_in", "accept_many", "put")
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


# Parts: made whole


#: Objects that have attributes set from outside, by their names in the code, and why.
OPEN = {
    # They belong to Python, to Flask, to Django, to Werkzeug, to SQLite, or to the logging of the program.
    *("sys", "app", "request", "response.cache_control", "server", "stream", "shown", "waiter"),
    *(
        "logger",
        "logging.root",
        "record",
        "_formatter",
        "weakref.finalize(self, _close, self._fds)",
    ),
    *("driver", "cursor", "self._own", "self._close_fd"),
    *("self.instance", "self.fields['name']", "member.handle.process"),
    # Variables of a thread.
    *("current", "last", "self._local", "self._limit", "self._last"),
    # Records: of a task, of a page of them, of one attempt and its end, of a row of the admin.
    *("task", "given", "changed", "self._copy", "page", "row", "op"),
    *("run", "call", "token", "ending", "transaction"),
    # Connections to a database: what is known of each is written on it.
    *("connection", "link"),
    # The test kit makes a program's queue one for tests, and back.
    *("queue", "driven", "Queue"),
}
#: Facts that an error carries, whatever its class.
OF_ERRORS = {"in_doubt", "task_id"}


def declared(kind: ast.ClassDef) -> set[str]:
    """Return the attributes that a class gives its objects."""
    set_by_it = {
        node.attr
        for node in ast.walk(kind)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    }
    annotated = [node.target for node in kind.body if isinstance(node, ast.AnnAssign)]
    given = [
        target for node in kind.body if isinstance(node, ast.Assign) for target in node.targets
    ]
    return set_by_it | {ast.unparse(target) for target in [*annotated, *given]}


def made_in(function: ast.FunctionDef) -> set[str]:
    """Return the names to which a function gives objects that it makes by a call of a class."""
    return {
        ast.unparse(target)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func).rpartition(".")[2].lstrip("_")[:1].isupper()
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }


def set_from_outside(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield each object and attribute that code outside of its class, and of its module, sets."""
    kinds = {node: declared(node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def visit(node: ast.AST, inside: set[ast.AST], own: set[str]) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.ClassDef):
            inside = {*inside, node}
        elif isinstance(node, ast.FunctionDef):
            own = own | made_in(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            whose = ast.unparse(node.value)
            here = any(node.attr in names for kind, names in kinds.items() if kind not in inside)
            if whose not in own and not here:
                yield whose, node.attr
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, own)

    yield from visit(tree, set(), {"self", "cls"})


def test_no_part_is_completed_from_outside():
    """A constructor gives a part all that it needs, and a method tells it what has changed.

    A module may write on the records that it has a class for, such as an entry of a list of its own.
    """
    found = {
        (module, whose, name)
        for module, tree in modules()
        for whose, name in set_from_outside(tree)
        if whose not in OPEN and name not in OF_ERRORS
    }
    assert found == set()


def test_no_object_is_open_without_need():
    used = {whose for _, tree in modules() for whose, _ in set_from_outside(tree)}
    assert OPEN.issubset(used)


#: Counts pairs of classes: an attribute of an object of the one is an object of the other, or its method.
#: The least of several counts: another thread may just have an object that it soon drops.
REFERENCES = """
import gc
from taskx import Config, Queue, SQLiteRepository

def count():
    found = (one for one in gc.get_objects() if not isinstance(one, type))
    ours = {id(one): one for one in found if type(one).__module__.startswith("taskx.")}
    kinds = set()
    for one in ours.values():
        slots = (getattr(kind, "__slots__", ()) for kind in type(one).__mro__)
        names = {*vars(one)} if hasattr(one, "__dict__") else set()
        names.update(*([some] if isinstance(some, str) else some for some in slots))
        for name in names:
            value = getattr(one, name, None)
            if id(value) in ours:
                kinds.add((type(one), type(value)))
            if id(owner := getattr(value, "__self__", None)) in ours:
                kinds.add((type(one), type(owner), "method"))
    return len(kinds)

queue = Queue(SQLiteRepository("tasks.db"), Config(worker_num=2))
queue.executor("noop")(lambda: None)
queue.start()
queue.submit("noop").result(60)
queue.drain(60)
print(min(count() for _ in range(20)))
queue.close()
"""


@pytest.mark.process
def test_the_parts_of_a_started_queue_know_few_others(tmp_path):
    """Each part names what it uses. One that only carries others would hide how many those are."""
    command = [sys.executable, "-c", REFERENCES]
    told = subprocess.run(
        command, cwd=tmp_path, stdout=subprocess.PIPE, timeout=PATIENCE, check=True
    )
    assert int(told.stdout) <= 245


# Rooms

#: The rooms, from the top down. A module imports from rooms below its own, which ``make layers`` checks.
ROOMS = ["contrib", "programs", "testing", "queue", "insight", "node", "attempt", "stores", "tasks"]
#: Modules that only give the public names of a room a short path.
SHORT_PATHS = {"dashboard.py", "engines.py", "cli/__init__.py", "cli/app.py"}


def test_rooms_are_nine_beside_the_doors_of_the_package():
    tops = {name.split("/")[0] for name, _ in modules() if name not in SHORT_PATHS}
    assert tops == {*ROOMS, "__init__.py", "__main__.py", "repository"}


def test_each_room_says_what_it_is_for():
    for room in ROOMS:
        words = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text("utf-8")))
        assert len((words or "").split()) >= 25, room


def test_modules_with_short_paths_only_import():
    for name, tree in modules():
        if name in SHORT_PATHS:
            first, *rest = tree.body
            assert isinstance(first, ast.Expr)
            assert all(isinstance(line, ast.ImportFrom) for line in rest), name


def test_modules_import_each_other_in_no_circle():
    trees = {dotted(name): tree for name, tree in modules()}
    graph = {
        name: {found if found in trees else found.rpartition(".")[0] for found in imported(tree)}
        for name, tree in trees.items()
    }
    order = [*graphlib.TopologicalSorter(graph).static_order()]  # raises CycleError
    assert {*order} >= trees.keys()


def dotted(path: str) -> str:
    """Return the name of a module from its path in the package."""
    parts = ["taskx", *path.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module) -> set[str]:
    """Return the names that a module imports when it is imported itself, each with its module's."""
    found = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return found


def test_the_design_pages_are_read_in_an_hour():
    """That is about 7,000 words, with those of the tables."""
    pages = (PACKAGE.parent / "docs").glob("design*.rst")
    assert sum(len(page.read_text("utf-8").split()) for page in pages) <= 7000
