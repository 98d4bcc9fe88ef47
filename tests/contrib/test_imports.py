"""Integrations are made of public names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

import taskx.contrib

FOLDER = Path(taskx.contrib.__file__).parent
ALLOWED = {
    *("taskx", "taskx.tasks.permission", "taskx.programs.cli.app", "taskx.node.broker"),
    *("taskx.programs.dashboard", "taskx.programs.dashboard.bodies", "taskx.testing"),
}


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the modules of TaskX that code imports when it runs, not those that only type checkers see."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom) and node.module:
        inside = [f"{node.module}.{name.name}" for name in node.names]
        yield from [name for name in inside if name in ALLOWED] or [node.module]
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def test_integrations_import_only_public_names():
    found = {
        name
        for file in FOLDER.glob("*.py")
        for name in imported(ast.parse(file.read_text("utf-8")))
        if name.partition(".")[0] == "taskx"
    }
    assert found == ALLOWED


def test_no_module_hides_what_it_imports():
    """A package imports its public names late, by their modules. All other imports are statements."""
    hides = re.compile(r"\b(import_module|__import__)\b")
    assert [
        str(file.relative_to(FOLDER))
        for file in sorted(FOLDER.rglob("*.py"))
        if hides.search(file.read_text("utf-8"))
    ] == ["django/__init__.py"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("module", "library", "error"),
    [
        ("flask", "flask", "ImportError"),
        ("otel", "opentelemetry", "ConfigurationError"),
        ("prometheus", "prometheus_client", "ConfigurationError"),
    ],
)
def test_without_the_library_the_error_names_the_extra(module, library, error):
    program = f"import sys; sys.modules[{library!r}] = None; import taskx.contrib.{module}"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert error in ran.stderr
    assert f"pip install 'taskx-queue[{module}]'" in ran.stderr
