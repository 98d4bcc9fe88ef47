"""The app."""

from django.apps import AppConfig


class ReportsConfig(AppConfig):
    """Reports, built in the background."""

    name = "reports"

    def ready(self) -> None:
        """Register the executors.

        The queue is not started here: this runs in every process that sets Django up, for ``migrate``
        and ``shell`` as well, and twice under ``runserver``. ``project/wsgi.py`` starts it.
        """
        from . import tasks  # noqa: F401  (needs the models, which are there only now)
