"""Tests of the reports: ``python -m pytest`` in this folder."""

from __future__ import annotations

import pytest
from reports import create_app
from reports.tasks import clean_up, report

from taskx import testing


@pytest.fixture
def app():
    return create_app({"TESTING": True, "TASKX_REPOSITORY": "memory://"})


@pytest.fixture
def queue(app):
    with testing.manual(app.extensions["taskx"].queue) as queue, app.app_context():
        yield queue


def test_a_report_adds_up_the_sales(app, queue):
    client = app.test_client()
    posted = client.post("/reports/2024-05", json=[1.5, 2])
    assert posted.status_code == 202
    again = client.post("/reports/2024-05", json=[1.5, 2])
    assert again.json == posted.json

    shown = f"/reports/{posted.json['id']}"
    assert client.get(shown).json["status"] == "pending"
    queue.run_all()
    assert client.get(shown).json == {
        "status": "completed",
        "progress": 100.0,
        "result": "2024-05: 3.50 EUR",
    }
    assert client.get("/reports/unknown").status_code == 404


def test_a_report_with_a_wrong_sale_fails_after_three_attempts(queue):
    handle = report.submit(month="2024-05", sales=["many"])
    queue.run_all(check=False)
    assert (handle.task().status, handle.task().errors) == ("failed", 3)


def test_the_newest_reports_stay(queue):
    for month in ("2024-04", "2024-05", "2024-06"):
        report.submit(month=month, sales=[1])
    queue.run_all()
    handle = clean_up.submit(keep=1)
    queue.run_all()
    assert handle.result() == 2
    assert [task.params["month"] for task in queue.iter_tasks(type="report")] == ["2024-06"]
