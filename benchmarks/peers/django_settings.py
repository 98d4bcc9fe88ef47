"""Settings of a Django project that has nothing but tasks in an SQLite file."""

import os

SECRET_KEY = "of no use to anybody"
USE_TZ = True
INSTALLED_APPS = ["django_tasks_db"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.path.join(os.environ["TASKX_BENCH_FOLDER"], "django.db"),
    }
}
TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}
