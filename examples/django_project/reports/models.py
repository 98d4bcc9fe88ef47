"""The model of a report."""

from django.db import models


class Report(models.Model):
    """A report that was built."""

    task_id = models.CharField(max_length=255, unique=True)
    title = models.CharField(max_length=200)
    rows = models.PositiveIntegerField()
