"""The server that is measured on."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pymongo

#: Names a server, for those who have one.
VARIABLE = "TASKX_TEST_MONGO_URL"


@contextmanager
def running(url: str) -> Iterator[str]:
    """The URL of the server that is named, here or by the environment, or of a small one of our own."""
    url = url or os.environ.get(VARIABLE, "")
    if url:
        yield url
        return
    if importlib.util.find_spec("secantus") is None:
        sys.exit(
            f"--mongo needs SecantusDB (pip install SecantusDB), or a server named by {VARIABLE}"
        )
    from tests.mongo_server import Server

    with tempfile.TemporaryDirectory(prefix="taskx-bench-", ignore_cleanup_errors=True) as folder:
        server = Server("set", Path(folder))
        try:
            yield server.start().url
        finally:
            server.kill()


def described(url: str) -> str:
    """What it says it is."""
    with pymongo.MongoClient(url) as client:
        told = client.server_info()
    ours = told.get("secantusVersion")
    name = f"SecantusDB {ours}" if ours else f"a server of MongoDB {told['version']}"
    return f"{name}, pymongo {pymongo.version}"
