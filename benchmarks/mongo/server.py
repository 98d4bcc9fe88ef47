"""The MongoDB server of the benchmark."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pymongo

#: The environment variable with the URL of a server.
VARIABLE = "TASKX_TEST_MONGO_URL"


@contextmanager
def running(url: str) -> Iterator[str]:
    """Yield the URL: the given one, the one in the environment, or that of a small server started here."""
    url = url or os.environ.get(VARIABLE, "")
    if url:
        yield url
        return
    if importlib.util.find_spec("secantus") is None:
        sys.exit(
            f"--mongo needs SecantusDB (pip install SecantusDB), or the URL of a server in {VARIABLE}"
        )
    from tests.mongo_server import Server

    with tempfile.TemporaryDirectory(prefix="taskx-bench-", ignore_cleanup_errors=True) as folder:
        server = Server("set", Path(folder))
        try:
            yield server.start().url
        finally:
            server.kill()


def described(url: str) -> str:
    """Return the name and version that the server reports."""
    with pymongo.MongoClient(url) as client:
        told = client.server_info()
    ours = told.get("secantusVersion")
    name = f"SecantusDB {ours}" if ours else f"a server of MongoDB {told['version']}"
    return f"{name}, pymongo {pymongo.version}"
