"""``manage.py taskx import-beat``: schedules of django-celery-beat become schedules of TaskX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        find_spec("django_celery_beat") is None or find_spec("django_tasks") is None,
        reason="django-celery-beat does not exist for this Django, or Django has no tasks",
    ),
]

SETTINGS = """\
from pathlib import Path

BASE_DIR = Path(__file__).parent
SECRET_KEY = "tests"
USE_TZ = True
INSTALLED_APPS = ["django_celery_beat", "taskx.contrib.django", "shop"]
TASKS = {"default": {"BACKEND": "taskx.contrib.django.TaskxBackend", "QUEUES": ["default", "mails"]}}
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": BASE_DIR / "site.db"}}
"""

TASKS = """\
from taskx.contrib.django import task

@task(queue_name="mails")
def mail(to): ...

@task
def report(month, day=1): ...
"""

ROWS = """\
from datetime import datetime, timedelta, timezone

from django_celery_beat.models import (
    ClockedSchedule, CrontabSchedule, IntervalSchedule, PeriodicTask, SolarSchedule
)

later = datetime.now(timezone.utc) + timedelta(days=9)
cron = lambda **fields: CrontabSchedule.objects.create(**fields)
row = lambda name, task="shop.tasks.report", **fields: PeriodicTask.objects.create(
    name=name, task=task, **fields
)
night = cron(minute="30", hour="2", timezone="Europe/Berlin")
minutes = IntervalSchedule.objects.create(every=15, period="minutes")
row("nightly", crontab=night, kwargs='{"month": "2024-05"}')
row("positional", crontab=cron(minute="*/5, 7", day_of_week="mon-fri"), args='["2024-05"]', priority=9)
row("often", interval=minutes, enabled=False, expire_seconds=60, kwargs='{"month": "2024-06"}')
row("mails", "shop.tasks.mail", interval=minutes, queue="mails", kwargs='{"to": "ann"}')
row("celery.backend_cleanup", "celery.backend_cleanup", crontab=night)
row("misfit", crontab=night, kwargs='{"moon": "2024-05"}')
row("nobody", "shop.tasks.nobody", crontab=night)
row("both days", crontab=cron(minute="0", hour="0", day_of_month="1", day_of_week="1"))
row("too fast", interval=IntervalSchedule.objects.create(every=5, period="microseconds"))
row("once", crontab=night, one_off=True)
row("later", crontab=night, start_time=later)
row("ends", crontab=night, expires=later)
row("sun", solar=SolarSchedule.objects.create(event="sunrise", latitude=52, longitude=13))
row("clocked", clocked=ClockedSchedule.objects.create(clocked_time=later), one_off=True)
"""

REFUSED = {
    "nobody": "shop.tasks.nobody",
    "misfit": "missing a required argument: 'month'",
    "both days": "one or the other",
    "too fast": "an interval must be from 0.1",
    "once": "it runs once",
    "later": "it begins at",
    "ends": "it ends at",
    "sun": "it follows the sun",
    "clocked": "it runs once, at a time",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site with the tables of both, and rows of every kind."""
    made = tmp_path_factory.mktemp("beat")
    (made / "settings.py").write_text(SETTINGS)
    (made / "shop").mkdir()
    (made / "shop" / "__init__.py").write_text("")
    (made / "shop" / "tasks.py").write_text(TASKS)
    done = run(
        made,
        "shell",
        "-c",
        f"from django.core.management import call_command\n"
        f"call_command('migrate', verbosity=0)\n{ROWS}",
    )
    assert done.returncode == 0, done.stderr
    return made


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join((str(folder), str(ROOT)))
    return {**os.environ, "DJANGO_SETTINGS_MODULE": "settings", "PYTHONPATH": path}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Call ``django-admin`` in the folder of the site."""
    return subprocess.run(
        [sys.executable, "-m", "django", *words],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=120,
    )


# Calls several commands in one interpreter; a start of Django takes most of the time of each.
CALLS = """
import io, json, sys, django
from django.core.management import CommandError, call_command

django.setup()
for words in json.loads(sys.argv[1]):
    output, code = io.StringIO(), 0
    try:
        exec(words[0]) if len(words) == 1 else call_command(*words, stdout=output)
    except CommandError as error:
        code = error.returncode
    print(json.dumps([code, output.getvalue()]))
"""


def calls(folder: Path, *commands: tuple[str, ...]) -> list[tuple[int, str]]:
    """Call commands, one after another; return the exit code and the output of each.

    A command of a single word is Python code.
    """
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(commands)],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def told(output: str) -> dict[str, dict[str, object]]:
    lines = [json.loads(line) for line in output.splitlines()]
    return {line.pop("name"): line for line in lines}


def test_rows_become_schedules_and_the_rest_is_told_with_its_reason(folder):
    change = (
        "from django_celery_beat.models import *; "
        "CrontabSchedule.objects.filter(minute='30').update(minute='45')"
    )
    listed, imports = ("taskx", "schedules", "--json"), ("taskx", "import-beat", "--json")
    tried, before, done, after, _, _, again, last, (_, words) = calls(
        folder,
        (*imports, "--dry-run"),
        listed,
        imports,
        listed,
        ("taskx", "schedules", "pause", "mails"),
        (change,),
        imports,
        listed,
        imports[:2],
    )
    assert before == (0, "")
    assert tried == done
    assert done[0] == 1
    outcomes = told(done[1])
    assert {name for name, one in outcomes.items() if one["outcome"] == "refused"} == {*REFUSED}
    for name, reason in REFUSED.items():
        assert reason in str(outcomes[name]["reason"]), name
    assert outcomes["positional"]["ignored"] == ["priority=9"]

    stored = told(after[1])
    assert {*stored} == {"nightly", "positional", "often", "mails"}
    shown = ("spec", "tz", "type", "params", "paused")
    assert [[stored[name][key] for key in shown] for name in sorted(stored)] == [
        ["every 900 s", "UTC", "shop.tasks.mail@mails", {"to": "ann"}, False],
        ["30 2 * * *", "Europe/Berlin", "shop.tasks.report", {"month": "2024-05"}, False],
        ["every 900 s", "UTC", "shop.tasks.report", {"month": "2024-06"}, True],
        [
            *("*/5,7 * * * mon-fri", "UTC", "shop.tasks.report"),
            *({"args": ["2024-05"], "kwargs": {}}, False),
        ],
    ]

    # A second time, only what has changed is changed; a pause in TaskX stays.
    assert {name: told(again[1])[name]["outcome"] for name in stored} == {
        "nightly": "changed",
        "positional": "unchanged",
        "often": "unchanged",
        "mails": "unchanged",
    }
    assert told(last[1])["mails"]["paused"]
    assert told(last[1])["nightly"]["spec"] == "45 2 * * *"

    assert "refused    sun: it follows the sun" in words
    assert "unchanged  nightly: 45 2 * * * Europe/Berlin, shop.tasks.report" in words


def test_a_site_without_celery_beat_is_told_what_is_missing(folder):
    (folder / "plain.py").write_text(SETTINGS.replace('"django_celery_beat", ', ""))
    done = run(folder, "taskx", "import-beat", "--settings", "plain")
    assert done.returncode == 2
    assert done.stderr == textwrap.dedent("""\
        taskx: 'django_celery_beat' is not in INSTALLED_APPS: add it again until its schedules are imported
        """)
