"""The Django app."""

from __future__ import annotations

from django.apps import AppConfig


class TaskxConfig(AppConfig):
    """The app with TaskX's tables. Its label is ``taskx``."""

    name = "taskx.contrib.django"
    label = "taskx"
    verbose_name = "TaskX"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Connect the signals and the checks."""
        from taskx.contrib.django import checks, queues  # noqa: F401  (they need the apps)
