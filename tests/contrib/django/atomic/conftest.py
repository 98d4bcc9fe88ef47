"""Fixtures: a repository in a Django database, its queue, and a table of the site in that database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import django_project
import pytest
from django.db import connections

from taskx import Queue
from taskx.contrib.django import DjangoRepository


@pytest.fixture(params=django_project.MAKERS)
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DjangoRepository]:
    from django.contrib.auth.models import Group

    with django_project.MAKERS[request.param](tmp_path) as made:
        Group.objects.using(made.using).all().delete()
        yield made
        connections.close_all()


@pytest.fixture
def using(repository: DjangoRepository) -> str:
    """The alias of the database."""
    return repository.using


def closing(ctx: object, task: object, call_next: Callable[[], Any]) -> Any:
    """Middleware that closes the connections of a worker's thread after each task."""
    try:
        return call_next()
    finally:
        connections.close_all()


@pytest.fixture
def queue(repository: DjangoRepository, make_queue: Callable[..., Queue]) -> Queue:
    made = make_queue(repository, worker_num=2, middleware=[closing])
    made.executor("echo")(lambda n=0: n)
    made.declare("elsewhere")
    return made


@pytest.fixture
def add(using: str) -> Callable[[str], Any]:
    """Write a row of the site, on the connection of the calling thread."""
    from django.contrib.auth.models import Group

    return lambda name: Group.objects.using(using).create(name=name)


@pytest.fixture
def names(using: str) -> Callable[[], list[str]]:
    """Return the names in the rows of the site."""
    from django.contrib.auth.models import Group

    return lambda: sorted(Group.objects.using(using).values_list("name", flat=True))
