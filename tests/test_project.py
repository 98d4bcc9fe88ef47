"""The project as a user sees it: version, public names, make, and forbidden text in files."""

from __future__ import annotations

import ast
import configparser
import glob
import graphlib
import importlib.metadata
import inspect
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import docutils.core
import docutils.nodes
import kinds
import pytest
from mariadb_server import SERVER_USED as MARIADB_USED
from mongo_server import SERVER_USED
from postgres_server import SERVER_USED as POSTGRES_USED

import taskx
from taskx import repository

ROOT = Path(__file__).parent.parent
BOOTSTRAP = ROOT / "tools" / "bootstrap.py"

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def run_make(*args: str) -> subprocess.CompletedProcess[str]:
    """Run make as from a shell, even if these tests were started by make."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *args], cwd=ROOT, env=env, capture_output=True, text=True)


# Docstrings


@pytest.mark.parametrize("folder", ["taskx", "tests"])
def test_docstrings_begin_with_what_the_thing_does_or_is(folder):
    """At most 3 % may begin with one of these words, which make a riddle of a sentence."""
    riddles = {"What", "Who", "Whose", "Whether", "Which", "Those", "That"}
    riddles |= {"How", "Where", "When", "From", "Of", "As", "So", "Nobody", "Nothing"}
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    files = (ROOT / folder).rglob("*.py")
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))))
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    firsts = [text.split()[0].strip("`,.:") for text in texts if text]
    assert sum(first in riddles for first in firsts) < 0.03 * len(firsts)


# Version and public names


def test_the_version_is_the_installed_one():
    assert importlib.metadata.version("taskx-queue") == taskx.__version__


def test_the_version_can_be_read_without_importing():
    """attrs is not installed during a build, so setuptools must find a literal."""
    tree = ast.parse((ROOT / "taskx" / "__init__.py").read_text())
    [version] = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if ast.unparse(node.targets[0]) == "__version__"
    ]
    assert version == taskx.__version__


def test_the_changelog_names_the_version():
    assert f"\n{taskx.__version__}" in (ROOT / "CHANGELOG.rst").read_text()


def test_all_is_sorted():
    """In ruff's order: CONSTANTS, then Classes, then functions."""
    names = list(taskx.__all__)
    assert names == sorted(set(names), key=lambda n: (not n.isupper(), not n[0].isupper(), n))


@pytest.mark.parametrize("name", taskx.__all__)
def test_each_public_name_exists_and_has_a_docstring(name):
    value = getattr(taskx, name)
    if inspect.isclass(value):
        assert vars(value).get("__doc__"), f"taskx.{name} has no docstring of its own"
    elif inspect.isroutine(value):
        assert value.__doc__, f"taskx.{name} has no docstring"


def test_the_example_repository_imports_only_the_public_module():
    source = (ROOT / "taskx" / "repository" / "example.py").read_text(encoding="utf-8")
    assert {*re.findall(r"^ *(?:from|import) (taskx[\w.]*)", source, re.M)} == {"taskx.repository"}


def test_the_names_for_authors_of_repositories_exist():
    assert [name for name in repository.__all__ if not hasattr(repository, name)] == []
    with pytest.raises(AttributeError, match="has no attribute 'Missing'"):
        repository.Missing  # noqa: B018


def loaded_by(program: str) -> set[str]:
    """Return the modules that a program loads in a new process. It must not warn or start a thread."""
    watched = (
        f"import json, sys, threading; before = {{*sys.modules}}; {program}; "
        "print(json.dumps([sorted({*sys.modules} - before), threading.active_count()]))"
    )
    child = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", watched],
        capture_output=True,
        text=True,
        check=True,
    )
    modules, threads = json.loads(child.stdout)
    assert threads == 1
    return {*modules}


@pytest.mark.process
def test_importing_taskx_loads_no_other_module():
    """Each public name is imported when it is first used: a program need not wait for the others."""
    modules = loaded_by("import taskx")
    assert modules - {"importlib", "importlib._bootstrap", "importlib._bootstrap_external"} == {
        "taskx"
    }


@pytest.mark.process
def test_a_queue_loads_only_what_it_needs():
    """It loads no optional package, and nothing that few programs use: each module costs time."""
    modules = loaded_by("import taskx; taskx.Queue; taskx.SQLiteRepository; taskx.executor")
    unwanted = {"asyncio", "bson", "celery", "django", "dramatiq", "flask", "pymongo", "sqlalchemy"}
    unwanted |= {
        "prometheus_client",
        "taskx.insight",
        "taskx.queue.flows",
        "taskx.tasks.annotations",
    }
    unwanted |= {"dataclasses", "decimal", "email", "graphlib", "hashlib", "logging.config"}
    unwanted |= {"multiprocessing", "pathlib", "shutil", "socket", "tempfile", "urllib", "uuid"}
    if sys.version_info >= (3, 11):  # before, platform loads it, which attrs imports
        unwanted.add("subprocess")
    assert not unwanted & modules


def test_type_checkers_see_each_public_name_where_it_is_imported_from():
    tree = ast.parse((ROOT / "taskx" / "__init__.py").read_text())
    checkers = {
        (alias.name, node.module)
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    programs = {(name, home) for home, names in taskx._HOMES.items() for name in names.split()}
    assert checkers == programs
    assert sorted(name for name, _ in programs) == sorted(taskx.__all__)


@pytest.mark.process
def test_a_public_name_that_nobody_has_used_yet_is_listed_copied_and_unpickled():
    loaded_by(
        "import taskx; assert {*taskx.__all__} < {*dir(taskx)}; "
        "everything = {}; exec('from taskx import *', everything); "
        "assert everything.keys() >= {*taskx.__all__}; assert 'Queue' in vars(taskx)"
    )
    pickled = pickle.dumps(taskx.Task(id="a"))
    loaded_by(f"import pickle; assert pickle.loads({pickled!r}).id == 'a'")
    with pytest.raises(AttributeError, match="'taskx' has no attribute 'Missing'"):
        taskx.Missing  # noqa: B018


# Imports


def imports(path: Path, modules: Iterable[str]) -> set[str]:
    """Return those of ``modules`` that a module imports, also in functions and for type checkers."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in modules else str(node.module) for name in named)
    return found.intersection(modules)


def test_no_module_imports_itself_through_others():
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "taskx").rglob("*.py")
    }
    graph = {name: imports(path, paths) for name, path in paths.items()}
    with pytest.raises(graphlib.CycleError):  # a cycle would be found
        graphlib.TopologicalSorter({**graph, "taskx.tasks.errors": {"taskx.queue.queue"}}).prepare()
    graphlib.TopologicalSorter(graph).prepare()


# make


@pytest.mark.process
@needs_make
def test_make_alone_lists_the_targets():
    listed = run_make()
    assert listed.returncode == 0
    targets = "packages demo quick test lint typecheck layers bench build ci ci-all clean"
    for target in [*targets.split(), "test-free-threaded"]:
        assert re.search(rf"^make {target} +\w", listed.stdout, re.M), target


def python_that(tmp_path: Path, pretends: str) -> Path:
    """Return an interpreter that executes the statement ``pretends`` before a script."""
    program = f'import runpy, sys; {pretends}; runpy.run_path(sys.argv[1], run_name="__main__")'
    shim = tmp_path / "python"
    shim.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{program}' \"$@\"\n")
    shim.chmod(0o755)
    return shim


@pytest.mark.process
@needs_make
@pytest.mark.parametrize(
    ("pretends", "found", "advice"),
    [
        ("sys.version_info = (3, 9, 18)", "Python 3.9.18", "PYTHON=python3.12 make test"),
        ('sys.modules["ensurepip"] = None', "ensurepip", "apt install python3-venv"),
        ('sys.modules["venv"] = None', "venv", "apt install python3-venv"),
    ],
)
def test_an_unsuitable_python_gets_a_one_line_error(tmp_path, pretends, found, advice):
    made = run_make("test", f"PYTHON={python_that(tmp_path, pretends)}", f"VENV={tmp_path}/venv")
    assert made.returncode != 0
    sentence, make_gave_up = made.stderr.splitlines()
    assert found in sentence
    assert advice in sentence
    assert make_gave_up.startswith("make: ***")
    assert not (tmp_path / "venv").exists()


@pytest.mark.process
@needs_make
def test_a_missing_python_gets_a_one_line_error(tmp_path):
    made = run_make("test", "PYTHON=python3.99", f"VENV={tmp_path}/venv")
    assert made.returncode != 0
    sentence, _make_gave_up = made.stderr.splitlines()
    assert "python3.99 was not found" in sentence


@pytest.mark.process
@needs_make
def test_make_removes_only_virtual_environments(tmp_path):
    keepsake = tmp_path / "keepsake"
    keepsake.touch()
    made = run_make("test", f"VENV={tmp_path}")
    assert made.returncode != 0
    assert f"{tmp_path} is not a virtual environment" in made.stderr
    assert keepsake.exists()


def old_pythons() -> list[str]:
    """Return all interpreters from pyenv and PATH that are too old for TaskX."""
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    pythons = [
        *glob.glob(f"{pyenv}/versions/2.7.*/bin/python"),
        *glob.glob(f"{pyenv}/versions/3.[69].*/bin/python"),
        *filter(None, map(shutil.which, ("python2.7", "python3.6", "python3.9"))),
    ]
    return [
        p for p in pythons if subprocess.run([p, "-c", ""], capture_output=True).returncode == 0
    ]


@pytest.mark.process
@pytest.mark.parametrize("python", old_pythons())
def test_bootstrap_explains_itself_on_an_old_python(tmp_path, python):
    ran = subprocess.run([python, BOOTSTRAP, tmp_path / "venv"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.startswith("TaskX needs Python 3.10 or newer, and ")
    assert len(ran.stderr.splitlines()) == 1


# The kinds of tests


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_quick_leaves_out_the_described_kinds_of_tests():
    [expression] = re.findall(r"^QUICK := not \((.+)\)$", (ROOT / "Makefile").read_text(), re.M)
    assert sorted(expression.split(" or ")) == sorted(kinds.KINDS)
    table = re.findall(r"^``(\w+)``  ", (ROOT / "CONTRIBUTING.rst").read_text(), re.M)
    assert sorted(table) == sorted(kinds.KINDS)


@pytest.mark.process
def test_a_test_without_a_required_mark_fails(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  mongo\n  process\n  slow\n")
    (tmp_path / "test_them.py").write_text(
        f"""
import os, pytest, subprocess, sys

def program():
    subprocess.run([sys.executable, "-c", ""])

def fork():
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)

def server():  # uses a server that an earlier test started
    sys.audit({SERVER_USED!r})

def postgres():
    sys.audit({POSTGRES_USED!r})

def mariadb():
    sys.audit({MARIADB_USED!r})

@pytest.mark.parametrize("do", [program, fork, server, postgres, mariadb])
def test_unmarked(do):
    do()

@pytest.mark.slow
def test_with_another_mark():
    program()

@pytest.mark.process
def test_marked():
    program()

@pytest.mark.parametrize("kind", ["memory", "mongo"])
def test_by_its_parameter(kind):
    if kind == "mongo":
        server()

@pytest.fixture
def spawn():
    return program

def test_by_its_fixture(spawn):
    spawn()
"""
    )
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "kinds", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert re.findall(r"^ERROR \S+::(\S+) - Failed: (.+) with", ran.stdout, re.M) == [
        ("test_unmarked[program]", "this test starts a program: mark it"),
        ("test_unmarked[fork]", "this test forks: mark it"),
        ("test_unmarked[server]", "this test uses a MongoDB server: mark it"),
        ("test_unmarked[postgres]", "this test uses a PostgreSQL server: mark it"),
        ("test_unmarked[mariadb]", "this test uses a MariaDB server: mark it"),
        ("test_with_another_mark", "this test starts a program: mark it"),
    ], ran.stdout
    assert "10 passed, 6 errors" in ran.stdout


def run_ci(tmp_path: Path, pythons: str, *args: str) -> tuple[str, list[str]]:
    """Run .ci/run with these Pythons and fake programs. Return its output, and make's test targets."""
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    (programs / "dirname").symlink_to(shutil.which("dirname") or "")
    found = [
        tmp_path / "pyenv" / "versions" / f"{python}.9" / "bin" / "python"
        for python in pythons.split()
    ]
    for path in found:
        path.parent.mkdir(parents=True)
    for path in [
        *found,
        *(
            programs / name
            for name in ("apt-get", "chromium", "git", "promtool", "python3", "strace")
        ),
    ]:
        path.symlink_to("/bin/true")
    (programs / "make").write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    (programs / "make").chmod(0o755)
    ran = subprocess.run(
        [shutil.which("bash") or "bash", ROOT / ".ci" / "run", *args],
        env={"PATH": str(programs), "PYENV_ROOT": str(tmp_path / "pyenv")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    told = re.sub(r"PYTHON=\S+ VENV=\.venv-", "", log.read_text()).replace(" ARGS=", "")
    return ran.stdout, [line for line in told.splitlines() if line.startswith(("test", "quick"))]


@pytest.mark.process
def test_ci_runs_all_tests_on_the_newest_python_and_parts_of_them_on_the_others(tmp_path):
    said, told = run_ci(tmp_path, "3.10 3.11 3.12 3.13")
    oldest, mock, *between, newest = told
    assert (oldest, newest) == ("quick 3.10", "test 3.13")
    assert mock == "test 3.10tests/storage -k mongomock"
    assert [line[:10] for line in between] == ["quick 3.11", "quick 3.12"]
    assert all("tests/executing" in line for line in between)
    assert not re.search(r"PYTHON \S+ IS MISSING", said)
    assert said.count("NO TEST RAN WITHOUT THE INTERPRETER'S LOCK") == 2  # at once, and at the end
    assert re.search(r"^ +\d+ s  in all$", said, re.M)


@pytest.mark.process
def test_ci_makes_one_environment_for_each_python(tmp_path):
    run_ci(tmp_path, "3.10 3.11 3.12 3.13")
    made = [
        line for line in (tmp_path / "log").read_text().splitlines() if ".venv-demo" not in line
    ]
    assert made[0].startswith("packages ")
    targets = {line.split()[0] for line in made if "VENV=.venv-3.13" in line}
    assert targets == {"packages", "lint", "typecheck", "layers", "test", "docs", "build"}
    assert all("VENV=.venv-3.1" in line for line in made)


@pytest.mark.process
def test_ci_tests_each_version_of_django(tmp_path):
    """Each Python that installs another version of Django runs Django's tests."""
    _said, told = run_ci(tmp_path, "3.10 3.11 3.12 3.13")
    left_out = [
        line for line in told if "tests/core" in line and "tests/contrib/django" not in line
    ]
    assert [line[:10] for line in left_out] == ["quick 3.12"]
    extra = setup_cfg()["options.extras_require"]["test"]
    assert re.findall(r"Django(\S+); python_version (.+)", extra) == [
        (">=4.2,<5", '< "3.11"'),
        (">=5.2,<6", '== "3.11"'),
        (">=6", '>= "3.12"'),  # also on the newest Python
    ]


@pytest.mark.process
def test_ci_with_all_runs_all_tests_on_every_python(tmp_path):
    said, told = run_ci(tmp_path, "3.10 3.11 3.12 3.13", "--all")
    assert "NO TEST RAN" not in said
    assert told == ["test 3.10", "test 3.11", "test 3.12", "test 3.13", "test-free-threaded"]


@pytest.mark.process
def test_ci_names_each_python_that_is_missing(tmp_path):
    said, told = run_ci(tmp_path, "3.12")
    assert told == ["test 3.12"]
    for version in ("3.10", "3.11", "3.13"):  # each one immediately, and in the summary
        assert said.count(f"!!!! PYTHON {version} IS MISSING") == 2


def test_ci_lists_every_python_and_only_existing_files():
    script = (ROOT / ".ci" / "run").read_text()
    pythons = re.search(r'^PYTHONS="(.+)"$', script, re.M)
    classifiers = setup_cfg()["metadata"]["classifiers"]
    assert pythons[1].split() == re.findall(r"Python :: (3\.\d+)", classifiers)
    named = re.findall(r"\btests/[\w/.]*\w", script)
    assert len(named) > 5
    assert all((ROOT / path).exists() for path in named)


# Files


def project_files() -> list[Path]:
    """Return the text files under version control, and new ones that are not ignored."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in names.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


@pytest.mark.process
@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("path of one machine", r"(?<![\w.])/(work|root|home|Users)/"),
        ("registry host", r"\b(pypi\.org|pythonhosted\.org|npmjs\.(org|com)|deb\.debian\.org)\b"),
    ],
)
def test_no_file_contains_a(what, pattern):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in project_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, what


def test_tests_do_not_sleep():
    """A line that must really block has the comment: # blocks on purpose."""
    sleeps = re.compile(r"\btime\.sleep\(|\bfrom time import\b.*\bsleep\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if sleeps.search(line) and "# blocks on purpose" not in line
    ]
    assert not found


def test_the_package_never_unpickles_or_evaluates_text():
    """The package imports no module that executes its input, and never executes text as code."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
    package = Path(taskx.__file__).parent
    files = list(package.rglob("*.py"))
    assert len(files) > 30
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), file
                continue
            else:
                continue
            assert not names & forbidden, file


def test_the_description_on_a_package_index_has_no_links_to_files(monkeypatch):
    """It is valid, because an index shows a page with an error as plain text."""
    given = {}
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=given.update))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    document = docutils.core.publish_doctree(
        given["long_description"], settings_overrides={"halt_level": 2, "syntax_highlight": "none"}
    )
    links = [node["refuri"] for node in document.findall(docutils.nodes.reference)]
    assert "A task is a record in an SQLite file" in given["long_description"]
    assert [link for link in links if "://" not in link] == []
