"""The configuration of the app."""

from django.apps import AppConfig


class ReportsConfig(AppConfig):
    """Reports, built in the background."""

    name = "reports"

    def ready(self) -> None:
        """Register the executors.

        The queue is not started here: this method runs in every process that sets Django up, also for
        ``migrate`` and ``shell``, and twice under ``runserver``. ``project/wsgi.py`` starts the queue.
        """
        from . import tasks  # noqa: F401  (needs the models, which can be imported only now)
