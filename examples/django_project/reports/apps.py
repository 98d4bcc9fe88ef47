"""The configuration of the app."""

from django.apps import AppConfig


class ReportsConfig(AppConfig):
    """Reports, built in the background."""

    name = "reports"
