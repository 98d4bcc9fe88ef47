"""Settings of a Django project that has only tasks and their backend."""

import os

_FOLDER = os.environ["TASKX_BENCH_FOLDER"]
_APP = os.environ["TASKX_BENCH_APP"]
_BACKENDS = {
    "django_tasks_db": {"BACKEND": "django_tasks_db.DatabaseBackend"},
    "django_ox": {"BACKEND": "django_ox.backend.OxBackend"},
    "threadmill": {
        "BACKEND": "threadmill.backends.redis.RedisTaskBackend",
        "REDIS_URL": f"unix://{_FOLDER}/redis.sock",
    },
}
#: The settings that Django's documentation recommends for an SQLite file with several writing threads.
_TUNED = {
    "timeout": 60,
    "transaction_mode": "IMMEDIATE",
    "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
}

SECRET_KEY = "not a secret"
USE_TZ = True
INSTALLED_APPS = [_APP]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.path.join(_FOLDER, "django.db"),
        "OPTIONS": _TUNED if _APP == "django_ox" else {},
    }
}
TASKS = {"default": _BACKENDS[_APP]}
#: Without this, writing two log lines per task would be most of the work.
LOGGING = {"version": 1, "loggers": {"django.tasks": {"level": "WARNING"}}}
