"""The examples of engines, run as readers run them."""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import sha256

import pytest
from helpers import PATIENCE, ROOT

COMMANDS = {
    "celery": ["celery", "-A", "celery_app", "worker", "--concurrency", "1"],
    "dramatiq": ["dramatiq", "dramatiq_app:broker", "--processes", "1"],
}


@pytest.mark.parametrize("engine", [*COMMANDS])
def test_an_example_runs_as_it_says(engine, tmp_path, broker):
    (tmp_path / "file").write_bytes(b"text")
    env = {**os.environ, "BROKER": broker.url, "TASKX_DB": str(tmp_path / "tasks.db")}
    env.update(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "examples")]), C_FORCE_ROOT="1")
    with open(tmp_path / "workers.log", "ab") as output:
        workers = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *COMMANDS[engine]],
            env=env,
            cwd=tmp_path,
            stdout=output,
            stderr=output,
        )
    try:
        ran = subprocess.run(
            [sys.executable, str(ROOT / "examples" / f"{engine}_app.py"), "file"],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    finally:
        workers.terminate()
        workers.wait(PATIENCE)
    assert ran.stdout == f"{sha256(b'text').hexdigest()} file\n", ran.stderr
