"""Starting fresh interpreters that find TaskX, and the modules of the program, as this process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from taskx.attempt.process.processes import MARK

_PATH = "TASKX_CHILD_PATH"


def start_python(
    function: str, *words: str, mark: str = "", path: Iterable[str] = (), **options: Any
) -> subprocess.Popen[bytes]:
    """Start an interpreter that calls a function, given as ``module:name``.

    Args:
        function: the function; its arguments are the words.
        words: the arguments of the program, ``sys.argv[1:]``.
        mark: a new text, by which :func:`kill_family` finds the process and all that it starts.
        path: more entries for ``sys.path``.
        options: the options of ``Popen``.
    """
    from multiprocessing import spawn

    module, name = function.split(":")
    # sys.path is set first, to find TaskX.
    boot = (
        f"import json, os, sys; sys.path[:] = json.loads(os.environ.pop('{_PATH}')); "
        f"from {module} import {name}; {name}(*sys.argv[1:])"
    )
    environment = {
        **os.environ,
        _PATH: json.dumps(list(dict.fromkeys(map(os.fspath, [*sys.path, *path])))),
        # A marked process may start others, so each keeps the marks of its ancestors.
        MARK: f"{os.environ.get(MARK, '')} {mark}".strip(),
    }
    # The interpreter, with the options of this process.
    python = spawn.get_command_line()[:-3]
    return subprocess.Popen([*python, "-c", boot, *words], env=environment, **options)
