"""The settings of a minimal project with one app, which uses TaskX."""

import sys
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = "this example has no secrets"
DEBUG = True
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
ROOT_URLCONF = "project.urls"
# "manage.py runserver" imports this module only in the process that serves. The queue is started there.
WSGI_APPLICATION = "project.wsgi.application"
INSTALLED_APPS = ["reports"]
MIDDLEWARE = [
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "reports.views.TaskErrors",
]
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
USE_TZ = True

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": BASE_DIR / "site.db",
        # Several threads write. Without this, a transaction that reads first could fail with "database is
        # locked".
        "OPTIONS": {"transaction_mode": "IMMEDIATE"},
        # A file, because the worker threads in tests have connections of their own.
        "TEST": {"NAME": BASE_DIR / "test-site.db"},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# The tasks are stored in a file of their own, which all processes share. Tests store them in memory.
TASKX_REPOSITORY = "memory://" if "test" in sys.argv else f"sqlite:///{BASE_DIR / 'tasks.db'}"
