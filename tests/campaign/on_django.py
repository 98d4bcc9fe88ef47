"""The part of a worker process of the campaign for Django's database, on PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import django_project

from taskx import RepositoryUnavailable
from taskx.stores.base import Repository
from taskx.tasks.timing import Timing

from . import hooks
from .sidelog import SideLog
from .stores import Store

if TYPE_CHECKING:
    from .worker import Options

#: The time-out of a statement, in seconds.
TIMEOUT = 2.0


class OnDjango(Store):
    """Tables in a PostgreSQL database; each process has its own connections."""

    points = hooks.COMMON_POINTS
    outages = (RepositoryUnavailable,)
    broken = hooks.BROKEN_LEASES

    @property
    def repository(self) -> Any:
        """The class whose ``apply`` commits; Django must be set up before it is imported."""
        django_project.set_up()
        from taskx.contrib.django.repository import DjangoRepository

        return DjangoRepository

    def open(self, options: Options) -> Repository:
        repository = self.repository
        parts = urlsplit(options.database)
        assert parts.hostname is not None
        assert parts.port is not None
        django_project.add_postgres("shared", parts.port, parts.path[1:], parts.hostname)
        made: Repository = repository(
            "shared",
            run_folder=options.host,
            lease_timeout=options.lease,
            timeout=TIMEOUT,
            timing=Timing(lease_margin=options.margin),
        )
        return made

    def prepare(self, log: SideLog) -> None:
        hooks.tell_lost_leases(log)
