"""Fixtures of the tests of Django. Each test process sets Django up when it collects this folder."""

import django_project

django_project.set_up()
