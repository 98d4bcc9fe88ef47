"""A database, as a process uses it: its transactions, and the news of others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from taskx.stores.parts import Listener, looking
from taskx.stores.postgres.link import Connections, Link
from taskx.stores.postgres.news import Channel
from taskx.stores.postgres.schema import Schema
from taskx.stores.sql import postgres
from taskx.stores.sql.pool import PoolLinks
from taskx.tasks import lifecycle
from taskx.tasks.checks import Duration
from taskx.tasks.findings import Check
from taskx.tasks.timing import Timing
from taskx.tasks.writes import Write


class PostgresLinks(PoolLinks[Link]):
    """The repository's own connections to its database.

    Args:
        url: a URL or a connection string of libpq.
        schema: the tables.
        timeout: seconds that a statement may take.
        listen: False if a pooler is in between.
        several: tells if several queues of this process must hear of each other's commits.
        timing: the intervals of its work.
    """

    connections: Connections

    def __init__(
        self,
        url: str,
        schema: Schema,
        timeout: Duration,
        listen: bool,
        several: Callable[[], bool],
        timing: Timing,
    ) -> None:
        made = Connections(url, timeout, timing, pooled=not listen, ready=self._make_ready)
        super().__init__(made, timing)
        self.schema = schema
        self._lookers: list[None] = []
        self._place: list[Any] = []
        self._seen: tuple[float, object] = (float("-inf"), None)
        name = f"{schema.prefix}news"
        self.channel = Channel(made, name, several, timing) if listen else None

    def _make_ready(self, link: Link) -> None:
        self.schema.migrate(link, self.timing.answer_within, create=not self._lookers)

    def _commits_itself(self, link: Link) -> bool:
        return not link.pooled

    def _begin(self, link: Link, durable: bool) -> None:
        postgres.begin(link, durable, self.connections.timeout)

    def _set_durable(self, link: Link, durable: bool) -> None:
        postgres.set_durable(link, durable)

    def _is_undone(self, link: Link, error: BaseException) -> bool:
        if self.connections.code(error) == postgres.READ_ONLY:
            self.connections.drop_writer()  # another host may take writes by now
            return True
        return super()._is_undone(link, error)

    def place(self, sql: str, table: str, *, anew: bool = False) -> list[Any]:
        """Return what a query tells of the database and a table in it; it is kept, unless asked anew."""
        if anew or not self._place:
            self._place = self.rows(sql, (table,))
        return self._place

    # --- news

    def tell_others(self, writes: Sequence[Write]) -> None:
        if self.channel is not None:
            self.channel.send(lifecycle.news_of(writes))

    def tell(self, news: str) -> None:
        """Tell other processes of news of some kinds."""
        if self.channel is not None:
            self.channel.send(news)

    def seen_commits(self) -> object:
        """Return what was seen of others' commits."""
        if self.channel is None:
            return self.revision()
        self.channel.ask()
        read_at, seen = self._seen
        now = time.monotonic()
        if not self.channel.hears or now - read_at >= self.timing.read_commits_every:
            seen = self.revision()
            self._seen = now, seen
        return self.channel.rung, seen

    def revision(self) -> object:
        ((snapshot,),) = self.rows(postgres.SNAPSHOT)
        return snapshot

    def listen(self, news: str) -> Listener | None:
        return None if self.channel is None else self.channel.listen(news)

    # --- the house, and forks

    def prepare(self) -> None:
        """Make the tables, or check that those of a Django project have all columns."""
        self.connections.read(self._make_ready)

    def held_back(self) -> float:
        ((seconds,),) = self.rows(postgres.OLDEST)
        return float(seconds)

    def only_existing(self) -> AbstractContextManager[None]:
        return looking(self._lookers)

    def examine(self) -> Iterator[Check]:
        from taskx.stores.postgres.examination import examine  # not needed to run tasks

        return examine(self.connections, self.schema, self.timing)

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
        self._place = []  # the next use may make the tables again
        super().close()

    def renew_after_fork(self) -> None:
        super().renew_after_fork()
        if self.channel is not None:
            self.channel.renew()
