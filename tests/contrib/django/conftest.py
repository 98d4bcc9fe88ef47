"""Fixtures of the tests of Django. Each test process sets Django up when it collects this folder."""

import django_project
import pytest

django_project.set_up()

from .sites import boss, browse, migrated, site  # noqa: E402, F401  (fixtures, with models)


@pytest.fixture(autouse=True)
def same_environment():
    """Replacing TIME_ZONE sets the time zone of the process, and does not set it back."""
    with django_project.same_environment():
        yield
