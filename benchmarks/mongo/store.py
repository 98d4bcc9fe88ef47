"""The store on a MongoDB server."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pymongo
from pymongo.monitoring import CommandListener

from benchmarks.loops import Loop
from benchmarks.mongo.loop import MongoLoop
from benchmarks.stores import Store
from taskx import MongoRepository
from taskx.stores.base import Repository


class OnMongo(Store):
    """A store with one database for each folder.

    Args:
        url: the server.
        listener: called for every command that TaskX sends.
        at_once: True if the floor reads and starts a task with one command.
    """

    durability = "majority"

    def __init__(
        self, url: str, listener: CommandListener | None = None, *, at_once: bool = False
    ) -> None:
        self.url = url
        self._at_once = at_once
        self._listeners = [] if listener is None else [listener]

    @contextmanager
    def repository(self, folder: str) -> Iterator[Repository]:
        client: pymongo.MongoClient[dict[str, Any]]
        with pymongo.MongoClient(self.url, event_listeners=self._listeners) as client:
            nodes = os.path.join(folder, "nodes")
            yield MongoRepository(client[database_of(folder)], run_folder=nodes)

    def loop(self, folder: str, count: int) -> Loop:
        return MongoLoop(url_of(self.url, folder), count, at_once=self._at_once)

    def name(self) -> str:
        return self.url

    def drop(self, folder: str) -> None:
        """Drop the databases of a folder and of its subfolders."""
        client: pymongo.MongoClient[dict[str, Any]]
        with pymongo.MongoClient(self.url) as client:
            for name in client.list_database_names():
                if name.startswith(database_of(folder)):
                    client.drop_database(name)


def database_of(folder: str) -> str:
    """Return the name of a folder's database."""
    return re.sub(r"\W", "_", os.path.relpath(folder, tempfile.gettempdir()))


def url_of(server: str, folder: str) -> str:
    """Return the URL of a folder's database."""
    return urlsplit(server)._replace(path=f"/{database_of(folder)}").geturl()
