"""The ETags of pages, by which a page that has not changed costs one cheap read."""

from __future__ import annotations

import hashlib
import os
import secrets

from taskx.queue.queue import Queue

#: Seconds after which a page is made again although nothing was stored: delays and deaths change it, too.
STEP = 5.0


class Freshness:
    """Makes the ETags of one dashboard.

    An ETag consists of a random text of this process, the repository's counter of changes, and the time in
    steps of five seconds.
    """

    def __init__(self, queue: Queue) -> None:
        self._repository = queue.repository
        self._clock = queue.clock
        self._process = secrets.token_hex(8)

    def etag(self, *parts: object) -> str | None:
        """Return the ETag of a page that depends on these parts and on what is stored.

        Return None if the repository cannot tell of changes.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        revision = self._repository.news.revision()
        if revision is None:
            return None
        step = int(self._clock.now_ms() / (STEP * 1000))
        # Processes that were forked after the app was made have counters of their own.
        process = self._process, os.getpid()
        return _digest(repr((process, revision, step, parts)).encode())


def etag_of(body: bytes) -> str:
    """Return the ETag of a page that has been made already."""
    return _digest(body)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
