"""Fixtures for tests of pages: a migrated database, users, and a queue with tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.core.management import call_command
from django.db import connections
from django.test import Client

from taskx.contrib.django.models import NoteRow, ParentRow, TagRow, TaskRow
from taskx.contrib.django.places import forget

#: The header by which a browser of today says that a form is on a page of the same site.
SAME = {"HTTP_SEC_FETCH_SITE": "same-origin"}


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make the tables of the site, once for all tests of a process."""
    for alias in ("default", "other"):  # other tests of the process have more of their own
        connections[alias].close()
        connections[alias].settings_dict["NAME"] = str(tmp_path_factory.mktemp("site") / alias)
        call_command("migrate", database=alias, verbosity=0)
    yield
    connections.close_all()


@pytest.fixture
def site(migrated: None) -> Iterator[None]:
    """The site of the test, without users, sessions and tasks of earlier tests."""
    for model in (User, TaskRow, ParentRow, TagRow, NoteRow):
        model.objects.all().delete()
    yield
    forget()
    connections.close_all()


@pytest.fixture
def browse(site: None) -> Callable[..., Client]:
    """Return a function that opens a browser in which a user is logged in, with these permissions."""

    def opened(*permissions: str, staff: bool = True, **options: Any) -> Client:
        user = User.objects.create_user(f"user-{User.objects.count()}", is_staff=staff)
        names = [name.partition(".")[2] for name in permissions]
        user.user_permissions.set(Permission.objects.filter(codename__in=names))
        assert user.user_permissions.count() == len(permissions)
        client = Client(**{**SAME, **options})
        client.force_login(user)
        return client

    return opened


@pytest.fixture
def boss(site: None) -> Client:
    """The browser of a superuser."""
    client = Client(**SAME)
    client.force_login(User.objects.create_superuser("boss"))
    return client
