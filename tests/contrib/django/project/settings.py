"""The settings of the Django project of the tests.

``TASKX_DJANGO_SQLITE`` is the path of the SQLite file of the database ``default``. The database ``other``
is a file beside it. If ``TASKX_DJANGO_SERVER`` is set, ``default`` is that database instead, such as
``postgresql://user@127.0.0.1:5432/name`` or ``mysql://user@127.0.0.1:3306/name``.
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
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "taskx.contrib.django",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
STATIC_URL = "static/"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # the quickest


def sqlite(path: str) -> dict[str, object]:
    return {"ENGINE": "django.db.backends.sqlite3", "NAME": path, "OPTIONS": {"timeout": 30}}


def use_pymysql() -> None:
    """Have Django use PyMySQL instead of mysqlclient, whose installation needs a compiler."""
    import pymysql

    pymysql.install_as_MySQLdb()


def on_server(url: str) -> dict[str, object]:
    parts = urlsplit(url)
    if parts.scheme == "mysql":
        use_pymysql()
    return {
        "OPTIONS": {"charset": "utf8mb4"} if parts.scheme == "mysql" else {},
        "ENGINE": f"django.db.backends.{parts.scheme}",
        "HOST": parts.hostname,
        "PORT": parts.port,
        "USER": parts.username,
        "PASSWORD": parts.password or "",
        "NAME": parts.path[1:],
    }


_file = os.environ.get("TASKX_DJANGO_SQLITE") or f"{tempfile.gettempdir()}/taskx-{os.getpid()}.db"
_server = os.environ.get("TASKX_DJANGO_SERVER")

DATABASES = {
    "default": on_server(_server) if _server else sqlite(_file),
    "other": sqlite(f"{_file}-other"),
}
