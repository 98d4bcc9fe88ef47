"""Tests of an app that uses TaskX. Worker threads see only committed data: use TransactionTestCase."""

# ruff: noqa: PT009, PT027  (this is Django's unittest)

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import CancelledError

from django.http import HttpResponse
from django.test import TransactionTestCase
from django.urls import reverse

from taskx import Task, TaskHandle

from .models import Report
from .tasks import queue

setUpModule = queue.start
tearDownModule = queue.stop


class ReportTest(TransactionTestCase):
    """Reports from the form to the database."""

    def submit(self, **form: object) -> TaskHandle[object]:
        """Submit a form. Return the task's handle."""
        response = self.client.post(reverse("submit"), form)
        self.assertRedirects(response, reverse("tasks"))
        return queue.handle(response["X-Task-Id"])

    def wait_until(self, handle: TaskHandle[object], holds: Callable[[Task], bool]) -> None:
        """Wait until a condition holds for a task."""
        deadline = time.monotonic() + 10
        while not holds(handle.task()):
            self.assertLess(time.monotonic(), deadline, handle.task())
            time.sleep(0.01)

    def status(self, handle: TaskHandle[object]) -> dict[str, object]:
        """Return the answer of the status view for a task."""
        told: dict[str, object] = self.client.get(reverse("task", args=[handle.id])).json()
        return told

    def cancel(self, handle: TaskHandle[object]) -> HttpResponse:
        """Cancel a task through its view."""
        return self.client.post(reverse("cancel", args=[handle.id]))

    def test_report_is_built(self) -> None:
        handle = self.submit(title="Sales", rows=2)
        report = Report.objects.get(pk=handle.result(timeout=10)["report"])
        self.assertEqual((report.title, report.rows, report.task_id), ("Sales", 2, handle.id))
        told = self.status(handle)
        self.assertEqual(
            (told["status"], told["progress"], told["message"]), ("completed", 100, "row 2 of 2")
        )
        self.assertContains(self.client.get(reverse("tasks")), "Sales")

    def test_running_report_is_cancelled(self) -> None:
        handle = self.submit(title="Endless", rows=1_000_000)
        self.wait_until(handle, lambda task: task.message != "")
        self.assertEqual(self.status(handle)["status"], "running")
        self.assertRedirects(self.cancel(handle), reverse("tasks"))
        with self.assertRaises(CancelledError):
            handle.result(timeout=10)
        self.assertEqual(self.status(handle)["status"], "cancelled")
        self.assertFalse(Report.objects.exists())

    def test_errors_are_answered(self) -> None:
        handle = self.submit(title="Once", rows=1, id="once")
        handle.result(timeout=10)
        for answer, code in (
            (self.client.post(reverse("submit"), {"title": "Twice", "id": "once"}), 409),
            (self.client.post(reverse("submit"), {"title": "None", "rows": "many"}), 400),
            (self.client.post(reverse("submit"), {"title": "None", "id": "x" * 300}), 400),
            (self.client.get(reverse("task", args=["nobody"])), 404),
            (self.cancel(handle), 409),
        ):
            with self.subTest(answer.request["PATH_INFO"], code=code):
                self.assertEqual(answer.status_code, code)
                self.assertIn("error", answer.json())
