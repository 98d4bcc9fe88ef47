"""The documentation runs, names everything public, and links only to what exists."""

from __future__ import annotations

import ast
import configparser
import functools
import re
import runpy
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import attrs
import docutils.core
import docutils.nodes
import pytest
from helpers import PATIENCE, eventually, joined_node, no_rounds, pool_of

import taskx
import taskx.queue
from taskx.node import due, housekeeper, ticker
from taskx.repository import COLUMNS, Repository
from taskx.stores.sqlite.connections import Connections
from taskx.tasks import options
from taskx.tasks.moves import MOVES
from taskx.tasks.redact import SECRETS
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.testing import RepositoryContract

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.rst", *sorted((ROOT / "docs").glob("*.rst"))]

# The program that runs a page: its blocks in order, in one namespace, with the page's own line numbers.
RUNNER = """\
import json, sys
namespace = {"__name__": "snippet"}
for line, source in json.load(sys.stdin):
    exec(compile("\\n" * line + source, sys.argv[1], "exec"), namespace)
"""


@functools.cache
def parse(page: Path) -> docutils.nodes.document:
    """Parse a page; callers change nothing in it."""
    settings = {"report_level": 2, "warning_stream": False, "syntax_highlight": "none"}
    return docutils.core.publish_doctree(
        page.read_text(encoding="utf-8"), source_path=str(page), settings_overrides=settings
    )


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return the code blocks of a page in one language, each with the number of lines above it."""
    text, found, position = page.read_text(encoding="utf-8"), [], 0
    for node in parse(page).findall(docutils.nodes.literal_block):
        if language in node["classes"]:
            source = node.astext()
            position = text.index(textwrap.indent(source, "    ").splitlines()[0], position)
            found.append((text.count("\n", 0, position), source))
    return found


def by_name(page: Path) -> str:
    """Name a page in a test's name."""
    return page.name


every_page = pytest.mark.parametrize("page", PAGES, ids=by_name)


# The snippets

# The blocks of the tutorial and the pages about Django are files: test_tutorial.py and
# contrib/django/test_page.py run them.
RUN = [
    page
    for page in PAGES  # not parsed yet: each process that only collects this file would wait for that
    if ".. code-block:: python" in page.read_text(encoding="utf-8")
    and not page.name.startswith(("tutorial.", "django.", "django-"))
]

#: Lines that the snippets of a page print, as their comments say.
PRINTED = {
    "README.rst": ["199-100.png", "completed 100", "paid", "12"],
    "docs/concepts.rst": ["failed 2 ['retried', 'failed']"],
    "docs/cancelling.rst": ["cancelled"],
    "docs/json.rst": ["params.items[0].price"],
    "docs/workflows.rst": ["90 completed 100.0", "12", "completed"],
    "docs/original.rst": ["Status: completed, Progress: 100%", "1 task(s) found"],
    "docs/web.rst": ["completed"],
    "docs/flask.rst": ["{'month': '2024-05', 'shop': 'shop'}"],
    "docs/mails.rst": ["a mail to ann@example.org"],
}


@pytest.mark.process
@pytest.mark.parametrize("page", RUN, ids=by_name)
def test_the_snippets_of_a_page_run_and_print_what_their_comments_say(page, tmp_path):
    """Run them one after the other, in a process and a folder of their own."""
    ran = run_page(page, tmp_path)
    assert ran.returncode == 0, ran.stderr
    printed = PRINTED.get(page.relative_to(ROOT).as_posix(), [])
    assert set(printed) <= set(ran.stdout.splitlines())


def test_each_page_whose_lines_are_known_is_run():
    assert {ROOT / page for page in PRINTED} <= set(RUN)


def run_page(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run all Python blocks of a page in a process of its own."""
    import json

    return subprocess.run(
        [sys.executable, "-X", "utf8", "-W", "error", "-c", RUNNER, page.name],
        cwd=folder,
        input=json.dumps(blocks(page, "python")),
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.process
def test_a_failing_snippet_is_noticed(tmp_path):
    """Otherwise the tests above would show nothing."""
    page = tmp_path / "page.rst"
    page.write_text("Page\n====\n\n.. code-block:: python\n\n    x = 1\n\n    assert x == 2\n")
    ran = run_page(page, tmp_path)
    assert ran.returncode == 1
    assert 'File "page.rst", line 8' in ran.stderr


@pytest.mark.process
def test_the_first_example_of_the_readme_hashes_nothing_when_it_is_started_again(tmp_path):
    """The README promises it: ``queue.map`` returns the results that are stored."""
    source = textwrap.indent(blocks(ROOT / "README.rst", "python")[0][1], "    ")
    page = tmp_path / "page.rst"
    page.write_text(f"Page\n====\n\n.. code-block:: python\n\n{source}\n")
    printed = []
    for _ in range(2):
        ran = run_page(page, tmp_path)
        assert ran.returncode == 0, ran.stderr
        printed.append(ran.stdout)
    assert printed[0] == printed[1]
    with taskx.SQLiteRepository(tmp_path / "tasks.db") as repository:
        tasks, total = taskx.Queue(repository).list_tasks(taskx.TaskFilter(limit=1000))
    assert total == len(tasks) == len(printed[0].splitlines()) > 100
    assert {len(task.attempts) for task in tasks} == {1}


def test_the_first_example_of_the_readme_is_short():
    first = blocks(ROOT / "README.rst", "python")[0][1]
    assert len([line for line in first.splitlines() if line.strip()]) <= 15


# A repository of one's own


def own_repository() -> str:
    """Return the text of the class in the example."""
    text = (ROOT / "examples" / "own_repository.py").read_text()
    return text[text.index("class ") : text.index("\n\n\ndef main")]


class TestOwnRepository(RepositoryContract):
    """The repository of the example passes the contract of every repository."""

    @pytest.fixture
    def repository(self, tmp_path):
        """Return an empty repository."""
        namespace = runpy.run_path(str(ROOT / "examples" / "own_repository.py"))
        return namespace["JSONFileRepository"](str(tmp_path / "tasks.json"))


def test_the_page_on_repositories_shows_the_example_word_for_word():
    shown = "".join(source for _, source in blocks(ROOT / "docs" / "own-repository.rst", "python"))
    assert own_repository() in shown


def test_the_repository_of_the_example_has_under_60_lines_as_the_page_says():
    page = (ROOT / "docs" / "own-repository.rst").read_text()
    assert "in under 60 lines" in re.sub(r"\s+", " ", page)
    assert len(own_repository().splitlines()) < 60


# Shell


@every_page
def test_the_make_targets_that_a_page_names_exist(page):
    rules = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    literals = [
        node.astext()
        for kind in (docutils.nodes.literal, docutils.nodes.literal_block)
        for node in parse(page).findall(kind)
    ]
    named = re.findall(r"^\s*make ([a-z]+)", "\n".join(literals), re.M)
    assert set(named) <= set(rules)


def test_the_readme_begins_with_the_two_commands_and_the_name_to_install():
    text = (ROOT / "README.rst").read_text()
    assert text.index("make demo") < text.index("make test") < text.index("pip install taskx-queue")
    assert "do not install both" in text


# What must be mentioned


@pytest.fixture(scope="module")
def code() -> str:
    """Return all literal text of all pages."""
    return "\n".join(
        node.astext()
        for page in PAGES
        for kind in (docutils.nodes.literal, docutils.nodes.literal_block)
        for node in parse(page).findall(kind)
    )


def public(cls: type) -> list[str]:
    """Return the public names that a class itself defines."""
    return [name for name in vars(cls) if not name.startswith("_")]


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("public names", taskx.__all__),
        ("settings", [field.name for field in attrs.fields(taskx.Config)]),
        ("options of submit", sorted(options.SubmitOptions.__optional_keys__)),
        ("options of an executor", sorted(options.ExecutorOptions.__optional_keys__)),
        ("fields of a filter", [field.name for field in attrs.fields(taskx.TaskFilter)]),
        ("fields of an attempt", [field.name for field in attrs.fields(taskx.Attempt)]),
        ("statuses", [status.value for status in taskx.TaskStatus]),
        ("reasons", [reason.value for reason in taskx.CancelReason]),
        ("fields of a task", [field.name for field in attrs.fields(taskx.Task)]),
        ("methods of a queue", public(taskx.Queue)),
        ("options of a schedule", sorted(options.ScheduleOptions.__optional_keys__)),
        ("parts of a schedule", public(taskx.Schedule)),
        ("parts of the context", public(taskx.Context)),
        ("methods of a repository", public(taskx.TaskRepository)),
        ("durability", ["accepted", "full", "process"]),
        ("overflow", ["reject", "block", "spill", "caller_runs"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_everything_public_is_named_on_a_page(what, names, code):
    internal = {  # of Context, for the runtime
        *("latest_progress", "message_was_cut", "new_progress", "progress_written", "shown"),
        *("checkpoints_refused", "keep_checkpoints"),
    }
    wanted = set(names) - (internal if what == "parts of the context" else set())
    missing = [name for name in wanted if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", code)]
    assert not missing, what


@every_page
def test_pages_for_users_name_no_private_module(page):
    if page.name.startswith("design"):  # for maintainers
        return
    text = page.read_text(encoding="utf-8")
    public = r"cli\.app|contrib|dashboard|engines|repository|testing"
    private = {path.parent.name for path in (ROOT / "taskx").glob("*/__init__.py")}
    private -= {"queue"}  # taskx.queue.submit(…) is a call of the extension for Flask
    named = re.findall(rf"\btaskx\.(?!{public})(?:{'|'.join(private)})\.[\w.]+", text)
    assert named == []


def test_the_table_of_rooms_has_the_order_of_the_layers():
    """``setup.cfg`` lists the layers; imports are checked by it."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    layers = config["importlinter:contract:layers"]["layers"]
    rows = table(ROOT / "docs" / "design.rst", "room")
    assert re.findall(r"\w+", " ".join(row[0] for row in rows)) == re.findall(r"\w+", layers)


def test_the_table_of_extras_has_all_that_programs_can_install():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = {*config["options.extras_require"]} - {"bench", "dev", "docs", "test"}
    rows = table(ROOT / "docs" / "deploying.rst", "Extra")
    assert sorted(row[0].strip("`") for row in rows) == sorted(extras)


def test_each_package_and_module_has_a_docstring():
    """A package has a second paragraph: who uses it, or what may be changed."""
    for file in (ROOT / "taskx").rglob("*.py"):
        said = ast.get_docstring(ast.parse(file.read_text())) or ""
        paragraphs = 2 if file.name == "__init__.py" and file.parent.name != "taskx" else 1
        assert len(said.split("\n\n")) >= paragraphs, file


def test_the_page_on_primitives_names_each_of_them():
    page = (ROOT / "docs" / "primitives.rst").read_text("utf-8")
    table = page.partition("Primitive  ")[2].partition("What only some stores can do")[0]
    assert [name for name in Repository.__abstractmethods__ if f"``{name}(" not in table] == []


def test_the_reference_for_authors_has_every_column_of_a_row():
    page = (ROOT / "docs" / "reference" / "authors.rst").read_text("utf-8")
    table = page.partition("Columns of a row")[2].partition("Constants, types")[0]
    named = re.findall(r"``(\w+)``", "\n".join(line[:44] for line in table.splitlines()))
    assert sorted(set(named) - {"COLUMNS"}) == sorted(COLUMNS)


def test_the_page_of_errors_names_every_error():
    text = (ROOT / "docs" / "errors.rst").read_text()
    errors = [n for n in taskx.__all__ if isinstance(getattr(taskx, n), type)]
    errors = [n for n in errors if issubclass(getattr(taskx, n), BaseException)]
    assert len(errors) > 10
    assert [name for name in errors if f"``{name}``" not in text] == []


def test_the_table_of_settings_has_the_defaults_of_the_code():
    rows = {row[0]: row[1] for row in table(ROOT / "docs" / "queue.rst", "Config")}
    shown = {"None": None, "1 MiB": 1 << 20, '"reject"': "reject", "some words": SECRETS}
    shown["3600"] = 3600.0
    defaults = attrs.asdict(taskx.Config())
    assert {name: shown.get(rows[name]) or rows[name] for name in defaults} == {
        name: str(value) if type(value) is int and value < 1000 else (value or "None")
        for name, value in defaults.items()
    }


def test_the_table_of_executor_options_has_all_options_in_order():
    rows = table(ROOT / "docs" / "executors.rst", "Executor option")
    assert [row[0] for row in rows] == [field.name for field in attrs.fields(options.Options)]


@pytest.mark.parametrize(
    ("method", "known"),
    [
        (taskx.Queue.executor, options.ExecutorOptions),
        (taskx.Queue.submit, options.SubmitOptions),
        (taskx.Queue.schedule, options.ScheduleOptions),
        (taskx.Queue.map, options.MapOptions),
    ],
)
def test_the_docstring_of_a_method_names_each_option(method, known):
    missing = [
        name for name in known.__annotations__ if not re.search(rf"\b{name}\b", method.__doc__)
    ]
    assert not missing


# Links


@pytest.fixture(scope="module")
def anchors() -> dict[Path, set[str]]:
    """Return the ids of the sections of each page, which a link can have after the #."""
    return {
        page.resolve(): {
            name
            for kind in (docutils.nodes.document, docutils.nodes.section)
            for node in parse(page).findall(kind)
            for name in node["ids"]
        }
        for page in PAGES
    }


@pytest.mark.parametrize("page", sorted({*ROOT.glob("*.rst"), *PAGES}), ids=by_name)
def test_the_markup_of_a_page_has_no_error(page):
    """The pages of the reference have directives of Sphinx, and ``make docs`` checks them."""
    found = parse(page).findall(docutils.nodes.system_message)
    assert [message.astext() for message in found if message["level"] > 1] == []


@every_page
def test_links_lead_somewhere(page, anchors):
    """Check links to pages and their sections, and files that are named in literal text."""
    document = parse(page)
    links = {
        node["refuri"].partition("#")[::2]
        for node in document.findall(docutils.nodes.reference)
        if "refuri" in node and "://" not in node["refuri"]
    }
    missing = {target for target, _ in links if not (page.parent / target).exists()}
    missing |= {
        f"{target}#{anchor}"
        for target, anchor in links
        if anchor and anchor not in anchors.get((page.parent / (target or page)).resolve(), ())
    }
    named = {
        node.astext()
        for node in document.findall(docutils.nodes.literal)
        if re.fullmatch(
            r"(docs|examples|tests|benchmarks|tools)/[\w./-]*|[A-Z]+\.rst", node.astext()
        )
    }
    missing |= {name for name in named if not (ROOT / name).exists()}
    assert not missing


def test_the_readme_has_at_most_250_lines_and_leads_to_the_index():
    text = (ROOT / "README.rst").read_text()
    assert len(text.splitlines()) <= 250
    assert "<docs/index.rst>" in text


CHINESE = ROOT / "README.zh-CN.rst"


@pytest.mark.parametrize(
    "kind",
    [
        docutils.nodes.section,
        docutils.nodes.paragraph,
        docutils.nodes.strong,
    ],
    ids=lambda kind: kind.__name__,
)
def test_the_chinese_readme_has_the_same_parts(kind):
    def parts(page: Path) -> int:
        return len(list(parse(page).findall(kind)))

    assert parts(CHINESE) == parts(ROOT / "README.rst")


def test_the_chinese_readme_has_the_same_code_and_links():
    def code(page: Path) -> list[str]:
        return [block.astext() for block in parse(page).findall(docutils.nodes.literal_block)]

    def links(page: Path) -> set[str]:
        found = parse(page).findall(docutils.nodes.reference)
        return {node["refuri"] for node in found} - {"README.zh-CN.rst", "README.rst"}

    english = ROOT / "README.rst"
    assert code(CHINESE) == code(english)
    assert links(CHINESE) == links(english)


def listed(name: str) -> list[str]:
    """Return the pages that begin the items of the last list of a page, as in the navigation."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8").partition("All pages\n")
    return re.findall(r"^- `[^<]+<([^>]+)>`_: .", text[2] or text[0], re.M)


def test_the_index_leads_to_every_page_in_two_steps():
    groups = listed("index.rst")
    assert groups[0] == "tutorial.rst"
    linked = {page for group in groups for page in listed(group)}
    pages = {page.name for page in (ROOT / "docs").glob("*.rst")} - {"index.rst"}
    assert pages <= {*groups, *linked}


def test_a_page_names_every_example():
    text = (ROOT / "docs" / "jobs.rst").read_text()
    examples = [path for path in (ROOT / "examples").iterdir() if path.name[0] not in "._"]
    assert [path.name for path in examples if f"``examples/{path.name}" not in text] == []


@pytest.mark.parametrize(("name", "language"), [("taskx.service", "ini"), ("Dockerfile", "docker")])
def test_the_page_on_deploying_shows_the_example_without_its_comments(name, language):
    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if line and not line.startswith("#")]

    [(_, shown)] = blocks(ROOT / "docs" / "deploying.rst", language)
    assert lines(shown) == lines((ROOT / "examples" / name).read_text(encoding="utf-8"))


# The design as built


def table(page: Path, title: str, *, head: bool = True) -> list[list[str]]:
    """Return the rows of the table with that title or first heading, without the head if it has one."""
    for node in parse(page).findall(docutils.nodes.table):
        rows = [
            [re.sub(r"\s+", " ", entry.astext()) for entry in row.findall(docutils.nodes.entry)]
            for row in node.findall(docutils.nodes.row)
        ]
        titles = [found.astext() for found in node.findall(docutils.nodes.title)]
        if title in (rows[0][0], *titles):
            return rows[1:] if head else rows
    raise AssertionError(f"no table {title!r}")


def test_the_table_of_moves_has_all_moves_of_the_code_in_order():
    rows = table(ROOT / "docs" / "design.rst", "The moves")
    assert [tuple(row[:3]) for row in rows] == [
        (move.name, *edge) for move in MOVES for edge in move.edges
    ]


def members() -> dict[str, set[str]]:
    """Return the names in each package, module and class of the code."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "taskx").rglob("*.py"):
        place = path.parent if path.name == "__init__.py" else path
        found[place.parent.name].add(place.stem)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        for name, node in [(place.stem, tree), *((node.name, node) for node in classes)]:
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef | ast.ClassDef):
                    found[name].add(part.name)
                elif isinstance(part, ast.Name | ast.Attribute) and isinstance(part.ctx, ast.Store):
                    found[name].add(part.id if isinstance(part, ast.Name) else part.attr)
    return found


def test_the_design_pages_name_only_what_is_there():
    """Modules from their room on, and members of modules and classes. Other tests check public calls."""
    found = members()
    found["taskx"].update(taskx.__all__)
    found |= {"ctx": found["Context"], "d": {"copy"}}
    for page in PAGES:
        if page.name.startswith("design") and page.stem != "design-transactions":
            for name in re.findall(r"``(\w+(?:\.\w+)+)\b", page.read_text(encoding="utf-8")):
                for owner, member in pairwise(name.split(".")):
                    assert member in found[owner], f"{page.name}: {name}"
    every = set[str]().union(*found.values())
    text = (ROOT / "docs" / "design.rst").read_text(encoding="utf-8")
    places = text.partition("Where a change goes\n")[2].partition("\nRows")[0]
    named = re.findall(r"``(\w+)``", places)
    assert len(named) > 10
    assert {*named} <= every


def test_the_page_on_settings_names_the_words_that_are_redacted():
    text = (ROOT / "docs" / "queue.rst").read_text().partition("Secrets in params\n")[2]
    words = re.findall(r"``(\w+)``", text.partition("Upper and lower case")[0].partition(":\n")[2])
    assert tuple(words) == SECRETS


def test_every_thread_has_a_name_and_is_in_the_table_of_threads():
    named = set()
    ours = {*(ROOT / "taskx").rglob("*.py")} - {*(ROOT / "taskx" / "testing").iterdir()}
    for path in ours:
        text = path.read_text(encoding="utf-8")
        named.update(re.findall(r'"(taskx-[a-z]+(?:-{number})?)"', text))
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Thread"):
                assert "name" in [keyword.arg for keyword in call.keywords], path
    rows = table(ROOT / "docs" / "design.rst", "taskx-worker-N", head=False)
    assert {row[0] for row in rows} == {name.replace("{number}", "N") for name in named}


def writing(log: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the statements of transactions that write."""
    readers: set[str] = set()
    found = []
    for thread, word in log:
        if word == "READ":
            readers.add(thread)
        elif word == "COMMIT" and thread in readers:
            readers.remove(thread)
        elif word in ("BEGIN", "INSERT", "UPDATE", "COMMIT"):
            found.append((thread, word))
    return found


def statement(sql: str) -> str:
    """Return the first word of a statement; READ for a BEGIN of a transaction that only reads."""
    word = sql.split(maxsplit=1)[0]
    return "READ" if sql == "BEGIN" else word


def trace(monkeypatch: pytest.MonkeyPatch, heard: Callable[[str], object]) -> None:
    """Call a function with every statement of every connection."""
    connect = Connections._connect

    def traced(self: Connections, *args: str) -> sqlite3.Connection:
        connection = connect(self, *args)
        connection.set_trace_callback(heard)
        return connection

    monkeypatch.setattr(Connections, "_connect", traced)


def test_a_task_costs_what_the_design_says(tmp_path, monkeypatch):
    """Count statements by step and thread, on all connections."""
    log: list[tuple[str, str]] = []
    trace(monkeypatch, lambda sql: log.append((threading.current_thread().name, statement(sql))))
    repository = taskx.SQLiteRepository(tmp_path / "tasks.db")
    with taskx.Queue(repository, taskx.Config(worker_num=1)) as queue:
        add = queue.executor("add")(lambda a, b: a + b)
        for _ in range(3):  # opens what there is to open, and compiles statements
            add.submit(a=0, b=0).result(PATIENCE)
            assert queue.drain(PATIENCE)
        tries = []
        with no_rounds(queue):  # the worker is idle, and the housekeeper comes to no conclusion
            for _ in range(
                5
            ):  # a write that waits for its turn, on a busy machine, is a transaction
                eventually(lambda: pool_of(queue).idles)
                log.clear()
                assert add.submit(a=1, b=1).result(PATIENCE) == 2
                tries.append(writing(log))
    repository.close()
    own = min(tries, key=len)

    rows = table(ROOT / "docs" / "design.rst", "Statements of one task")
    assert [row[1] for row in rows] == ["the caller's", "a worker"]
    said = [row[2].split(", ") for row in rows]
    assert [statement for _, statement in own] == [*said[0], *said[1]]
    threads = [threading.current_thread().name] * len(said[0]) + ["taskx-worker-1"] * len(said[1])
    assert [thread for thread, _ in own] == threads


# The part of a statement that tells which read of an idle node it is.
IDLE = {
    "data_version": "PRAGMA data_version",
    "owners": "(SELECT min(owner)",
    "stuck_on": "(SELECT min(stuck_on)",
    "expires_at": "expires_at <= ",
    "run_at": "run_at <= ",
    "nodes": "name >= 'node/'",
    "pauses": "name >= 'pause'",
    "schedules": "name > 'schedule/'",
    "own tasks": "owner = '{node}'",
    "free tasks": "owner = ''",
    "waiting_on": "(SELECT min(waiting_on)",
    "concurrency_key": "(SELECT min(concurrency_key)",
}


def test_an_idle_node_reads_what_the_design_says(tmp_path, monkeypatch):
    """It reads nothing else, and as often. The test moves the clock from tick to tick."""
    log: list[str] = []
    trace(monkeypatch, log.append)
    now = time.monotonic()
    for module in (due, housekeeper, ticker):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    repository = taskx.SQLiteRepository(tmp_path / "tasks.db")
    queue = taskx.Queue(repository, taskx.Config(worker_num=1))
    queue.executor("add")(lambda a, b: a + b)
    node = joined_node(queue)  # its threads are not started: the test ticks

    def pass_time(seconds: int) -> None:
        nonlocal now
        until = now + seconds
        while now < until:
            now += DEFAULT_TIMING.poll_every
            node._housekeeper.tick()

    pass_time(4)  # opens what there is to open
    log.clear()
    pass_time(40)
    reads = Counter(log)
    repository.liveness.leave(node.record.id)
    repository.close()

    seen: Counter[str] = Counter()
    for sql, count in reads.items():
        [what] = [w for w, mark in IDLE.items() if mark.format(node=node.record.id) in sql]
        seen[what] += count
    each = {"11 times a second": 444, "2 times a second": 80, "every 2 seconds": 20}
    said: Counter[str] = Counter()
    for how_often, what in table(ROOT / "docs" / "design.rst", "Reads of an idle node"):
        for one in what.split(", "):
            said[one] += each[how_often]
    for one in ("owners", "own tasks"):  # of pending tasks, and of running ones
        seen[one] //= 2
    assert seen == {what: pytest.approx(count, rel=0.2) for what, count in said.items()}
