"""Django's checks tell what is wrong with the options of an alias; decorators and imports do not fail."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from django.core import checks
from django.test.utils import override_settings
from helpers import PATIENCE
from shop import tasks

from taskx import ConfigurationError
from taskx.contrib.django import get_queue
from taskx.contrib.django.compat import task_backends

BACKEND = "taskx.contrib.django.TaskxBackend"
BARE = ["django.contrib.contenttypes"]


def found(**options: Any) -> list[tuple[str, str]]:
    """Return the ids and texts of the messages for an entry with these options."""
    with override_settings(TASKS={"default": {"BACKEND": BACKEND, "OPTIONS": options}}):
        tasks.add.using(
            priority=1
        )  # an option that is not valid does not prevent the import of tasks
        return [(one.id, f"{one.msg} {one.hint}") for one in task_backends["default"].check()]


def test_valid_options_have_no_messages(tmp_path):
    assert found() == []
    assert found(workers=3, embedded=False, database="other", on_commit="refuse") == []
    assert found(repository=f"sqlite:///{tmp_path}/a.db", retention={"completed": 60}) == []
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("options", "id", "text"),
    [
        ({"worker": 3}, "E001", "there is no option 'worker'; did you mean 'workers'?"),
        ({"workers": 0}, "E001", "workers: worker_num must be"),
        ({"overflow": "drop"}, "E001", "OPTIONS: overflow must be one of"),
        ({"embedded": "no"}, "E001", "embedded must be a bool, not 'no'"),
        ({"on_commit": "never"}, "E001", "on_commit must be 'wait' or 'refuse', not 'never'"),
        ({"hooks": "shop.tasks.Alert"}, "E001", "hooks must be a list"),
        ({"hooks": ["shop.tasks.Alert"]}, "E001", 'hooks: Module "shop.tasks" does not define'),
        ({"repository": "sqlite:///a", "database": "other"}, "E001", "say the same"),
        ({"repository": "redis://here"}, "E002", "'redis://here' is not the URL of a repository"),
        ({"database": "third"}, "E003", "names 'third', which is not in DATABASES"),
    ],
)
def test_each_mistake_has_an_id_and_a_text_that_names_the_value(options, id, text):
    ((given, said),) = found(**options)
    assert given == f"taskx.{id}"
    assert text in said


def test_without_the_app_the_tasks_need_a_place(tmp_path):
    with override_settings(INSTALLED_APPS=BARE, BASE_DIR=tmp_path):
        assert found() == []
        ((id, text),) = found(database="other")
        assert id == "taskx.E004"
        assert "Add 'taskx.contrib.django' to INSTALLED_APPS" in text
        assert [id for id, _ in found(database="default")] == ["taskx.E004"]
    with override_settings(INSTALLED_APPS=BARE, BASE_DIR=None):
        ((id, text),) = found()
        assert id == "taskx.E002"
        assert "or set BASE_DIR" in text


def test_without_the_app_no_task_goes_to_a_file_instead_of_the_database(tmp_path):
    entry = {"BACKEND": BACKEND, "OPTIONS": {"database": "default"}}
    with (
        override_settings(TASKS={"default": entry}, INSTALLED_APPS=BARE, BASE_DIR=tmp_path),
        pytest.raises(ConfigurationError, match=r"database requires 'taskx\.contrib\.django'"),
    ):
        tasks.add.enqueue(1, b=2)
    assert [*tmp_path.iterdir()] == []


def test_an_option_outside_of_options_is_told():
    entry = {"BACKEND": BACKEND, "QUEUES": ["default"], "workers": 3}
    with override_settings(TASKS={"default": entry}):
        (message,) = task_backends["default"].check()
    assert message.id == "taskx.W003"
    assert f"{message.msg} {message.hint}" == (
        "The key 'workers' has no effect here. Put it into OPTIONS."
    )


def test_two_aliases_at_one_place_are_told(tmp_path):
    entry = {"BACKEND": BACKEND}
    with override_settings(TASKS={"default": entry, "low": entry}):
        assert task_backends["default"].check() == []
        (message,) = task_backends["low"].check()
    assert message.id == "taskx.W001"
    assert str(message.obj) == "TASKS['low']"
    with override_settings(
        TASKS={"default": entry, "low": entry}, INSTALLED_APPS=BARE, BASE_DIR=tmp_path
    ):
        assert task_backends["low"].check() == []  # each has its own file


def test_manage_py_check_runs_them_and_tells_the_place_with_deploy(tmp_path):
    url = f"sqlite:///{tmp_path}/a.db"
    with override_settings(TASKS={"default": {"BACKEND": BACKEND, "OPTIONS": {"workers": 0}}}):
        assert [one.id for one in checks.run_checks(databases=[]) if "taskx" in one.id] == [
            "taskx.E001"
        ]
    with override_settings(
        TASKS={"default": {"BACKEND": BACKEND, "OPTIONS": {"repository": url, "embedded": False}}}
    ):
        messages = checks.run_checks(include_deployment_checks=True, databases=[])
        (told,) = [one for one in messages if (one.id or "").startswith("taskx.")]
        assert told.id == "taskx.I001"
        assert f"{tmp_path}/a.db" in told.msg
        assert "need a worker" in told.msg


def test_an_alias_that_is_not_there_has_no_queue():
    with pytest.raises(ConfigurationError, match="TASKS has no alias 'low'"):
        get_queue("low")


_PROGRAM = """
import django
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["django.contrib.contenttypes", "taskx.contrib.django"],
    TASKS={"default": {"BACKEND": "taskx.contrib.django.TaskxBackend", "OPTIONS": {"worker": 3}}},
)
django.setup()
from django.core.management import call_command
from django.core.management.base import SystemCheckError
try:
    call_command("check")
except SystemCheckError as error:
    print(error)
"""


@pytest.mark.process
def test_a_site_that_has_imported_no_task_is_checked_too():
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=PATIENCE
    )
    assert "taskx.E001" in done.stdout, done.stderr
    assert "did you mean 'workers'?" in done.stdout
