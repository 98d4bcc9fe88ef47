"""Tests of an app that uses TaskX: tasks run at the commit, on the thread of the test."""

# ruff: noqa: PT009  (this is Django's unittest)

from __future__ import annotations

from django.test import TestCase, override_settings
from django.urls import reverse

from taskx.contrib.django import get_queue

from .models import Report

INLINE = {
    "default": {
        "BACKEND": "taskx.contrib.django.InlineBackend",
        "QUEUES": ["default", "mails"],
    }
}


@override_settings(TASKS=INLINE)
class ReportTest(TestCase):
    """Reports from the form to the database."""

    def submit(self, **form: object) -> Report:
        """Send the form, and let its task run. Return the report."""
        with self.captureOnCommitCallbacks(execute=True):
            response = self.client.post(reverse("submit"), form)
        self.assertRedirects(response, reverse("reports"))
        return Report.objects.get()

    def test_a_report_is_built_and_sent(self) -> None:
        report = self.submit(title="Sales", rows=3)
        self.assertEqual((report.title, report.total), ("Sales", 6))
        told = self.client.get(reverse("report", args=[report.pk])).json()
        self.assertEqual(
            (told["status"], told["progress"], told["message"]), ("completed", 100, "row 3 of 3")
        )
        self.assertContains(self.client.get(reverse("reports")), "Sales")
        sent = get_queue().list_tasks(type="reports.tasks.send@mails").tasks[0]  # the newest
        self.assertEqual((sent.status, sent.errors), ("completed", 1))  # the second attempt

    def test_a_built_report_is_not_cancelled(self) -> None:
        report = self.submit(title="Sales", rows=1)
        answer = self.client.post(reverse("cancel", args=[report.pk]))
        self.assertEqual(answer.status_code, 409)

    def test_a_wrong_form_stores_nothing(self) -> None:
        answer = self.client.post(reverse("submit"), {"title": "None", "rows": "many"})
        self.assertEqual(answer.status_code, 400)
        self.assertFalse(Report.objects.exists())

    def test_pages_of_tasks_are_for_staff(self) -> None:
        self.assertEqual(self.client.get(reverse("taskx:dashboard")).status_code, 302)
