"""The JSON API: each call, its errors, and the document that describes it."""

from __future__ import annotations

import json
import re
from datetime import timedelta

import pytest
from werkzeug.datastructures import MultiDict

from taskx import RepositoryUnavailable, TaskStatus
from taskx.insight.query import FIELDS
from taskx.programs.dashboard import ALL, Dashboard
from taskx.programs.dashboard.api import CALLS, MOST_STREAMS
from taskx.programs.dashboard.app import Map
from taskx.queue.bulk import Bulk
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.testing import ManualClock


@pytest.fixture
def queue(make_queue):
    queue = make_queue()
    queue.declare("report", "email")
    return queue


@pytest.fixture
def api(look, queue):
    return look(queue)


@pytest.fixture
def failed(make_queue):
    """Return a function that stores tasks that have failed, and returns their ids."""

    def store(number=1):
        other = make_queue()

        @other.executor("broken")
        def broken():
            raise ValueError("broken <b>")

        ids = [other.submit("broken").id for _ in range(number)]
        other.start()
        other.drain()
        other.stop()
        return ids

    return store


# --- questions


def test_tasks_are_listed_page_by_page(api, queue):
    ids = [queue.submit("report", {"n": n}).id for n in range(5)]
    queue.submit("email")
    seen, after = [], ""
    while after is not None:
        query = {"q": "type:report", "limit": "2", **({"after": after} if after else {})}
        page = api.get("/api/tasks", query_string=query).json
        assert page["total"] == 5
        seen += [task["id"] for task in page["tasks"]]
        after = page["next"]
    assert seen == ids[::-1]


def test_one_task_and_why_it_waits(api, queue):
    task_id = queue.submit("report", {"n": 1}, delay=1000).id
    task = api.get("/api/task", query_string={"id": task_id}).json
    assert (task["id"], task["status"], task["params"]) == (task_id, "pending", {"n": 1})
    kinds = [reason["kind"] for reason in api.get(f"/api/why?id={task_id}").json]
    assert kinds[0] == "due"


def test_stats_and_health(api, queue):
    queue.submit("report")
    assert api.get("/api/stats?period=60").json["types"]["report"]["waiting"] == 1
    answer = api.get("/api/health")
    assert answer.status_code == 503
    assert answer.json["problems"][0]["kind"] == "nodes"
    queue.cancel_all(everything=True)
    queue.start()
    assert api.get("/api/health").json["ok"] is True


def test_params_are_left_out_without_the_permission_to_see_them(look, queue):
    task_id = queue.submit("report", {"n": "hunter2"}).id
    answer = look(queue, permissions={"read"}).get(f"/api/task?id={task_id}")
    assert "hunter2" not in answer.text
    assert not {"params", "result", "checkpoints", "log"} & answer.json.keys()


FIELDS_GIVEN = {
    "type": ["report", "email"],
    "status": ["pending", "failed"],
    "tag": ["eu", "us"],
    "by": ["ann", "ben"],
    "error": ["", "out"],
    "error_type": ["", "ValueError"],
    "id": ["wan", "x"],
    "params.": ["7", '"7"'],
    "parent": ["first", "wanted"],
    "flow": ["", "f1"],
    "older": ["0s", "1d"],
    "newer": ["1d", "0s"],
    "since": ["2020-01-01", "2999-01-01T10:00Z"],
    "until": ["2999-01-01", "2020-01-01"],
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_list_takes_each_field_of_the_filter_as_a_parameter(make_queue, look, name):
    clock = ManualClock()
    queue = make_queue(clock=clock)
    queue.declare("report", "email")
    queue.submit("email", id="first", created_by="cid", tags=["fr"])
    options = {"created_by": "ann", "tags": ["eu"], "depends_on": ["first"]}
    queue.submit("report", {"user": {"id": 7}}, id="wanted", **options)
    found, missed = FIELDS_GIVEN[name]
    clock.advance(timedelta(seconds=1))  # beyond "0s"
    api = look(queue)
    parameter = "params.user.id" if name == "params." else name
    for value, ids in ((found, {"wanted"}), (missed, set())):
        answer = api.get("/api/tasks", query_string={parameter: value})
        if value:
            assert {task["id"] for task in answer.json["tasks"]} & {"wanted"} == ids, answer.json


def test_parameters_and_a_filter_line_are_combined(api, queue):
    queue.submit("report", {"say": 'a "b" c'}, created_by="ann or ben", tags=["eu", "big"])
    queue.submit("report", tags=["eu"])
    queue.submit("email", created_by="ann or ben", tags=["eu", "big"])

    def total(*query):
        return api.get("/api/tasks", query_string=MultiDict(query)).json["total"]

    assert total(("q", "type:report"), ("by", "ann or ben")) == 1
    assert total(("tag", "eu"), ("tag", "big")) == 2
    assert total(("params.say", 'a "b" c'), ("status", "pending")) == 1


def test_a_stream_takes_the_fields_of_the_filter_as_parameters(api, queue):
    queue.submit("email")
    task_id = queue.submit("report").id
    with api.get("/api/changes?type=report&seconds=1") as answer:
        stream = lines(answer)
        assert next(stream)["id"] == task_id
        assert "now" in next(stream)


def test_hidden_params_cannot_be_searched_by_a_parameter(look, queue):
    answer = look(queue, permissions={"read"}).get("/api/tasks?params.pin=4711")
    assert answer.status_code == 403


# --- changes


def test_tasks_are_cancelled_and_deleted_by_id(api, queue):
    ids = [queue.submit("report").id for _ in range(3)]
    answer = api.post("/api/cancel", json={"ids": ids[:2]})
    assert answer.json == {"action": "cancel", "changed": 2, "finished": True}
    assert api.post("/api/delete", json={"ids": [*ids[:2], "nothing"]}).json["changed"] == 2
    assert [task.id for task in queue.list_tasks().tasks] == ids[2:]


def test_all_that_match_are_counted_and_changed(api, queue):
    for n in range(3):
        queue.submit("report", {"n": n})
    queue.submit("email")
    body = {"query": "type:report", "dry_run": True}
    assert api.post("/api/cancel", json=body).json["matched"] == 3
    assert queue.count_tasks(status="pending") == 4
    done = api.post("/api/cancel", json={"query": "type:report"}).json
    assert (done["changed"], done["finished"]) == (3, True)
    assert [task.type for task in queue.iter_tasks(status="pending")] == ["email"]


@pytest.mark.every_store
def test_failed_tasks_run_again_at_a_rate(api, queue, failed):
    failed(3)
    done = api.post("/api/requeue", json={"query": "type:broken", "rate": "1/h"}).json
    assert done["changed"] == 3
    starts = [task.run_at for task in queue.iter_tasks(status="pending")]
    assert max(starts) - min(starts) == timedelta(hours=2)


@pytest.mark.timing(request_within=0)
def test_a_change_that_takes_long_is_cut_into_requests(api, queue):
    for _ in range(DEFAULT_TIMING.batch + 1):
        queue.submit("report")
    answers = [api.post("/api/cancel", json={"query": "type:report"}).json for _ in range(2)]
    assert [one["changed"] for one in answers] == [DEFAULT_TIMING.batch, 1]
    assert not answers[0]["finished"]


def test_a_change_needs_its_permission(look, queue):
    task_id = queue.submit("report").id
    for name in ("cancel", "requeue", "delete"):
        browser = look(queue, permissions=ALL - {name})
        answer = browser.post(f"/api/{name}", json={"ids": [task_id]})
        assert answer.status_code == 403
        assert f"“{name}”" in answer.json["error"]
    assert queue.get_task_status(task_id).status is TaskStatus.PENDING


# --- errors


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/api/nowhere", 404, "not found"),
        ("/api/task", 400, "parameter id is missing"),
        ("/api/task?id=nothing", 404, "nothing"),
        ("/api/tasks?q=tipe:x", 400, "did you mean"),
        ("/api/tasks?limit=0", 400, "limit must be a whole number from 1 to 1000"),
        ("/api/tasks?limit=9999999999999999999", 400, "limit must be"),
        ("/api/tasks?after=x", 400, "after"),
        ("/api/changes?seconds=-1", 400, "seconds must be"),
        ("/api/cancel", 405, "not allowed"),
        ("/api/tasks?statsu=failed", 400, "unknown parameter 'statsu'; did you mean 'status'?"),
        ("/api/tasks?created_by=ann", 400, "did you mean 'by'?"),
        ("/api/tasks?params=7", 400, "did you mean 'params.'?"),
        ("/api/tasks?x=1", 400, "unknown parameter 'x'; the known ones are q, type, status, tag"),
        ("/api/tasks?status=done", 400, "status"),
        ("/api/tasks?newer=soon", 400, "is not a duration"),
        ("/api/tasks?status=failed&status=pending", 400, "'status' is given twice"),
        ("/api/tasks?limit=1&limit=2", 400, "'limit' is given twice"),
        ("/api/tasks?q=type:a&type=b", 400, "'type' twice"),
        ("/api/tasks?q=error:%22x&type=a%22b&by=c", 400, "quotation mark"),
        ("/api/changes?statsu=failed", 400, "did you mean 'status'?"),
        ("/api/task?id=x&q=type:a", 400, "unknown parameter 'q'; the known ones are id"),
        (
            "/api/stats?created_by=1",
            400,
            "unknown parameter 'created_by'; the known ones are period",
        ),
        ("/api/health?verbose", 400, "unknown parameter 'verbose'; this call has none"),
        ("/api/openapi.json?x=1", 400, "this call has none"),
    ],
)
def test_an_error_is_one_line_of_json(api, path, status, words):
    answer = api.get(path)
    assert answer.status_code == answer.json["status"] == status
    assert words in answer.json["error"]
    assert "\n" not in answer.json["error"]


def test_a_call_with_the_wrong_method_is_told_the_right_one(api):
    assert api.get("/api/cancel").headers["Allow"] == "POST"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", 'needs "ids"'),
        (b'{"ids": "x"}', "a list of texts"),
        (b'{"ids": [], "query": ""}', "cannot be combined"),
        (b'{"query": "", "dry": true}', "unknown name 'dry'"),
        (b'{"query": "", "dry_run": 1}', "must be true or false"),
        (b'{"query": "", "rate": "1/s"}', "only for requeue"),
        (b'{"query": "status:done"}', "status"),
    ],
)
def test_a_wrong_body_changes_nothing(api, queue, body, words):
    task_id = queue.submit("report").id
    answer = api.post("/api/cancel", data=body, content_type="application/json")
    assert answer.status_code == 400
    assert words in answer.json["error"]
    assert queue.get_task_status(task_id).status is TaskStatus.PENDING


def test_a_body_must_say_that_it_is_json(api):
    answer = api.post("/api/cancel", data=b"{}", content_type="text/plain")
    assert answer.status_code == 400
    assert "Content-Type" in answer.json["error"]


# --- the stream


def lines(answer):
    """Yield the records of a stream of JSON lines."""
    for chunk in answer.response:
        yield json.loads(chunk)


@pytest.mark.timing(stream_every=0.01)
def test_a_stream_tells_the_tasks_and_then_their_changes(api, queue):
    first, second = queue.submit("report").id, queue.submit("report").id
    with api.get("/api/changes?q=status:pending&seconds=300") as answer:
        stream = lines(answer)
        assert [next(stream)["id"], next(stream)["id"]] == [first, second]
        assert "now" in next(stream)
        queue.cancel_task(first)
        changed = next(record for record in stream if record)
        assert (changed["id"], changed["status"]) == (first, "cancelled")
        third = queue.submit("report").id
        assert next(record for record in stream if record)["id"] == third


def test_a_limited_number_of_streams_is_served(api, queue):
    open_ones = [api.get("/api/changes") for _ in range(MOST_STREAMS)]
    refused = api.get("/api/changes")
    assert refused.status_code == 503
    for answer in open_ones:
        answer.close()
    with api.get("/api/changes?seconds=1") as answer:
        assert answer.status_code == 200


# --- the document


def test_the_document_describes_each_route_and_no_other(api, queue):
    paths = api.get("/api/openapi.json").json["paths"]
    app = Dashboard(queue, permissions=ALL)
    routes = {
        (rule.rule.removeprefix("/api"), method.lower())
        for rule in next(v for v in vars(app).values() if isinstance(v, Map)).iter_rules()
        for method in rule.methods - {"HEAD"}
        if rule.rule.startswith("/api/") and rule.rule != "/api/openapi.json"
    }
    assert {(path, method) for path in paths for method in paths[path]} == routes


def test_the_document_names_the_fields_of_the_filter(api):
    paths = api.get("/api/openapi.json").json["paths"]
    for name, more in (("tasks", ["limit", "after", "at_most"]), ("changes", ["seconds"])):
        given = {one["name"]: one["schema"] for one in paths[f"/{name}"]["get"]["parameters"]}
        assert [*given] == ["q", *(field.rstrip(".") for field in FIELDS), *more]
        assert given["tag"] == {"type": "array", "items": {"type": "string"}}
        [pattern] = given["params"]["patternProperties"]
        assert re.search(pattern, "params.user.id")
        assert not re.search(pattern, "params")


def test_a_change_refuses_parameters(api, queue):
    task_id = queue.submit("report").id
    answer = api.post("/api/cancel?dry_run=1", json={"ids": [task_id]})
    assert answer.status_code == 400
    assert queue.get_task_status(task_id).status is TaskStatus.PENDING


def test_the_document_names_its_own_address(api):
    answer = api.get("/api/openapi.json", base_url="http://localhost/admin/taskx")
    assert answer.json["servers"] == [{"url": "/admin/taskx/api"}]


def matches(value, schema, document):
    """Return True if JSON values match a schema of the document: those parts that it uses."""
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    kinds = schema.get("type")
    if kinds is not None:
        python = {
            "object": dict,
            "array": list,
            "string": str,
            "boolean": bool,
            "integer": int,
            "number": (int, float),
            "null": type(None),
        }
        assert any(
            isinstance(value, python[k]) for k in ([kinds] if isinstance(kinds, str) else kinds)
        )
    if isinstance(value, dict):
        assert {*schema.get("required", ())} <= value.keys()
        assert value.keys() <= schema.get("properties", value).keys()
        for name, part in schema.get("properties", {}).items():
            if name in value:
                matches(value[name], part, document)
    if isinstance(value, list) and "items" in schema:
        for item in value:
            matches(item, schema["items"], document)
    assert value in schema.get("enum", [value])
    return True


def test_answers_match_the_document(api, failed):
    [task_id] = failed()
    document = api.get("/api/openapi.json").json
    for call in CALLS:
        if call.method == "GET" and call.answer != "Lines":
            query = {"id": task_id} if call.name in ("task", "why") else {}
            answer = api.get(f"/api/{call.name}", query_string=query)
        elif call.method == "POST":
            answer = api.post(f"/api/{call.name}", json={"query": "type:email", "dry_run": True})
        else:
            continue
        described = document["paths"][f"/{call.name}"][call.method.lower()]["responses"]["200"]
        assert matches(answer.json, described["content"]["application/json"]["schema"], document)
    error = document["components"]["schemas"]["Error"]
    assert matches(api.get("/api/task?id=nothing").json, error, document)


def test_a_change_is_noted_in_the_audit_log(look, queue):
    task_id = queue.submit("report").id
    browser = look(queue, permissions=lambda environ: ALL)
    as_ann = {"environ_overrides": {"REMOTE_USER": "ann"}}
    browser.post("/api/cancel", json={"ids": [task_id]}, **as_ann)
    browser.post("/task/delete", data={"id": task_id, "confirmed": "1"}, **as_ann)
    queue.submit("report")
    browser.post("/api/delete", json={"query": "type:report"})
    browser.post("/api/delete", json={"query": "type:report"})  # nothing is left to change
    noted = [(change.by, change.action, change.target) for change in queue.changes()]
    assert noted == [
        ("dashboard", "delete", "type:report"),
        ("ann", "delete", task_id),
        ("ann", "cancel", "1 tasks"),
    ]


def test_a_change_that_fails_half_way_is_noted(api, queue, monkeypatch):
    def fail_after_a_batch(self, wanted, on_progress):
        on_progress(Bulk(action="cancel", matched=5, changed=4))
        raise RepositoryUnavailable("the disk is gone")

    monkeypatch.setattr(type(queue), "cancel_all", fail_after_a_batch)
    assert api.post("/api/cancel", json={"query": "type:report"}).status_code == 503
    assert [change.detail for change in queue.changes()] == ["4 changed"]


def test_asking_only_for_the_headers_of_streams_opens_none(look):
    browser = look()
    for _ in range(2 * MOST_STREAMS):
        assert browser.head("/api/changes").status_code == 200


@pytest.mark.parametrize("limit", ["0000000000011000000", "9" * 5000])
def test_leading_zeros_do_not_lift_a_limit(look, limit):
    assert look().get("/api/tasks", query_string={"limit": limit}).status_code == 400
