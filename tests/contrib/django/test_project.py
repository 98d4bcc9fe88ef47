"""The project of the tests."""

import os

import django_project
from django.apps import apps


def test_the_environment_of_other_tests_is_as_before():
    """Django sets ``TZ`` when it reads its settings."""
    assert os.environ.get("TZ") == django_project.TZ_BEFORE
    assert "DJANGO_SETTINGS_MODULE" not in os.environ


def test_the_app_has_the_label_taskx():
    assert apps.get_app_config("taskx").name == "taskx.contrib.django"
