"""Django in the process of the tests, with the settings of ``tests/contrib/django/project``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

#: The folder of the project's ``manage.py``.
FOLDER = Path(__file__).parent / "contrib" / "django"
#: The variable ``TZ`` before Django changed it.
TZ_BEFORE = os.environ.get("TZ")


def set_up() -> None:
    """Set Django up once in this process. The environment and the time zone stay as they were.

    Other tests may run in the same process, and must not notice.
    """
    import django
    from django.conf import settings

    if settings.configured:
        return
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    before = {name: os.environ.get(name) for name in ("DJANGO_SETTINGS_MODULE", "TZ")}
    os.environ["DJANGO_SETTINGS_MODULE"] = "project.settings"
    try:
        django.setup()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        time.tzset()
