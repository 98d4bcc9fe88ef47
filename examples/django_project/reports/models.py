"""The model of a report."""

from django.db import models


class Report(models.Model):
    """A report. The task ``build`` fills it."""

    title = models.CharField(max_length=200)
    rows = models.PositiveIntegerField()
    task_id = models.CharField(max_length=255, default="")
    total = models.PositiveIntegerField(null=True)
    sent = models.BooleanField(default=False)
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.title
