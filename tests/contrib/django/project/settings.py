"""The settings of the Django project of the tests.

``TASKX_DJANGO_SQLITE`` is the path of the SQLite file of the database ``default``. The database ``other``
is a file beside it. If ``TASKX_DJANGO_POSTGRES`` is set, ``default`` is that database instead, such as
``postgresql://user@127.0.0.1:5432/name``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

BASE_DIR = Path(__file__).parent
SECRET_KEY = "tests"
DEBUG = False
ALLOWED_HOSTS = ["*"]
USE_TZ = True
TIME_ZONE = "UTC"
ROOT_URLCONF = "project.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LOGGING_CONFIG = None  # the tests' own processes keep their logging

INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "taskx.contrib.django",
]


def sqlite(path: str) -> dict[str, object]:
    return {"ENGINE": "django.db.backends.sqlite3", "NAME": path, "OPTIONS": {"timeout": 30}}


def postgres(url: str) -> dict[str, object]:
    parts = urlsplit(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": parts.hostname,
        "PORT": parts.port,
        "USER": parts.username,
        "PASSWORD": parts.password or "",
        "NAME": parts.path[1:],
    }


_file = os.environ.get("TASKX_DJANGO_SQLITE") or f"{tempfile.gettempdir()}/taskx-{os.getpid()}.db"
_server = os.environ.get("TASKX_DJANGO_POSTGRES")

DATABASES = {
    "default": postgres(_server) if _server else sqlite(_file),
    "other": sqlite(f"{_file}-other"),
}
