"""Starting fresh interpreters that find TaskX, and the modules of the program, as this process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

_PATH = "TASKX_WORKER_PATH"


def start_python(function: str, *words: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start an interpreter that calls a function, given as ``module:name``.

    Args:
        function: the function; it has no arguments.
        words: the arguments of the program, ``sys.argv[1:]``.
        options: the options of ``Popen``.
    """
    from multiprocessing import spawn

    module, name = function.split(":")
    # sys.path is set first, to find TaskX.
    boot = (
        f"import json, os, sys; sys.path[:] = json.loads(os.environ.pop('{_PATH}')); "
        f"from {module} import {name}; {name}()"
    )
    path = json.dumps(list(map(os.fspath, sys.path)))
    # The interpreter, with the options of this process.
    python = spawn.get_command_line()[:-3]
    environment = {**os.environ, _PATH: path}
    return subprocess.Popen([*python, "-c", boot, *words], env=environment, **options)
