"""Fixtures of the tests of Django. Each test process sets Django up when it collects this folder."""

import django_project

django_project.set_up()

from .sites import boss, browse, migrated, site  # noqa: E402, F401  (fixtures, with models)
