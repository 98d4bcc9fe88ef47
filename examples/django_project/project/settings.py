"""The settings of a minimal project with one app, which has its work done by TaskX."""

import sys
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = "an example keeps no secrets"
DEBUG = True
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
ROOT_URLCONF = "project.urls"
# "manage.py runserver" imports it in the process that serves: that is where the queue is started.
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
        # Several threads write: one that read first would else be refused ("database is locked").
        "OPTIONS": {"transaction_mode": "IMMEDIATE"},
        # A file, as the tests' worker threads have connections of their own.
        "TEST": {"NAME": BASE_DIR / "test-site.db"},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# Where tasks are kept: a file of their own, shared by all processes; nothing that outlives a test.
TASKX_REPOSITORY = "memory://" if "test" in sys.argv else f"sqlite:///{BASE_DIR / 'tasks.db'}"
