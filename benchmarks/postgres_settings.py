"""Settings of a Django project on the PostgreSQL server of a benchmark."""

import os

SECRET_KEY = "not a secret"
USE_TZ = True
INSTALLED_APPS = os.environ["TASKX_BENCH_APPS"].split(",")
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": "127.0.0.1",
        "PORT": os.environ.get("TASKX_BENCH_PORT", ""),
        "NAME": os.environ.get("TASKX_BENCH_DATABASE", ""),
        "USER": "postgres",
        "CONN_MAX_AGE": None,
    }
}
TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}
#: Without this, writing two log lines per task would be most of the work.
LOGGING = {"version": 1, "loggers": {"django.tasks": {"level": "WARNING"}}}
