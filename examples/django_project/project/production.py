"""The settings for a server. Its values are in the environment.

The processes of the site store tasks, and others run them::

    export DJANGO_SETTINGS_MODULE=project.production SECRET_KEY=… ALLOWED_HOSTS=shop.example
    python manage.py migrate && python manage.py collectstatic
    gunicorn project.wsgi
    python manage.py taskx worker --processes 2
"""

import os

from project.settings import *  # noqa: F403
from project.settings import BASE_DIR, DATABASES, TASKS

DEBUG = False
SECRET_KEY = os.environ["SECRET_KEY"]
ALLOWED_HOSTS = os.environ["ALLOWED_HOSTS"].split(",")
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = True
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
STATIC_ROOT = BASE_DIR / "static"

if "PGDATABASE" in os.environ:  # libpq reads PGHOST, PGUSER and the others itself
    DATABASES["default"] = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ["PGDATABASE"],
    }

TASKS["default"]["OPTIONS"]["embedded"] = False
