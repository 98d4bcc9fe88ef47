"""The description of the JSON API, as an OpenAPI document that is made from the calls."""

from __future__ import annotations

import re
from typing import Any

import taskx
from taskx.programs.dashboard.api import CALLS, Call, Parameter
from taskx.programs.dashboard.private import FIELDS
from taskx.tasks.model import TASK_FIELDS, TIME_FIELDS, TaskStatus

_TEXT = {"type": "string"}
_TIME = {"type": ["string", "null"], "format": "date-time"}
_COUNT = {"type": "integer", "minimum": 0}
_ANYTHING: dict[str, Any] = {}

_TASK: dict[str, Any] = {
    "status": {"type": "string", "enum": [str(status) for status in TaskStatus]},
    "params": {"type": "object"},
    "result": _ANYTHING,
    "progress": {"type": "integer", "minimum": 0, "maximum": 100},
    "duration": {"type": "number"},
    "priority": {"type": "integer"},
    "timeout": {"type": ["number", "null"]},
    "max_attempts": {"type": ["integer", "null"]},
    "max_crashes": {"type": ["integer", "null"]},
    "retry": {"type": ["object", "null"]},
    "unique_key": {"type": ["string", "null"]},
    "unique_scope": {"type": ["string", "null"]},
    "depends_on": {"type": "array", "items": _TEXT},
    "tags": {"type": "array", "items": _TEXT},
    "on_parent_failure": {"type": ["string", "null"]},
    "concurrency_key": {"type": ["string", "null"]},
    "cost": {"type": ["object", "null"]},
    **dict.fromkeys(("errors", "crashes", "interruptions", "snoozes", "starts"), _COUNT),
    "dead_letter": {"type": "boolean"},
    "earlier_attempts": {"type": "array", "items": {"type": "object"}},
    "checkpoints": {"type": ["object", "null"]},
    "version": {"type": ["string", "null"]},
    **dict.fromkeys(TIME_FIELDS, _TIME),
}


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], **more}


def _schemas() -> dict[str, Any]:
    finding = _object({"kind": _TEXT, "sentence": _TEXT, "facts": {"type": "object"}})
    task = _object({name: _TASK.get(name, _TEXT) for name in (*TASK_FIELDS, "flow")})
    task["required"] = [name for name in TASK_FIELDS if name not in FIELDS]
    task["description"] = (
        f"Without the permission see_params, {', '.join(FIELDS)} are left out. Values are redacted by key."
    )
    return {
        "Task": task,
        "Page": _object(
            {
                "tasks": {"type": "array", "items": {"$ref": "#/components/schemas/Task"}},
                "total": _COUNT,
                "exact": {"type": "boolean"},
                "next": {"type": ["string", "null"]},
                "searched_since": _TIME,
            }
        ),
        "Reasons": {"type": "array", "items": finding},
        "Stats": _object(
            {
                "types": {"type": "object", "additionalProperties": {"type": "object"}},
                "checked_at": _TIME,
                "answers": _COUNT,
                "period": {"type": "number"},
                "since": _TIME,
                "complete": {"type": "boolean"},
            }
        ),
        "Health": _object(
            {
                "ok": {"type": "boolean"},
                "problems": {"type": "array", "items": finding},
                "checked_at": _TIME,
            }
        ),
        "Lines": {
            "description": (
                'Lines of JSON: the newest tasks that match, oldest first; then {"now": …}; then each task '
                "that is new or has changed. An empty object is a sign of life."
            ),
            "oneOf": [{"$ref": "#/components/schemas/Task"}, {"type": "object"}],
        },
        "Change": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "ids": {"type": "array", "items": _TEXT, "description": "The tasks to change."},
                "query": {"type": "string", "description": "A filter line; instead of ids."},
                "dry_run": {"type": "boolean", "description": "Only count; with query."},
                "rate": {"type": "string", "description": "Such as 100/m; with requeue and query."},
            },
        },
        "Changed": {
            "type": "object",
            "required": ["action", "changed", "finished"],
            "properties": {
                "action": _TEXT,
                **dict.fromkeys(("changed", "matched", "asked", "more"), _COUNT),
                "dry_run": {"type": "boolean"},
                "exact": {"type": "boolean"},
                "skipped": {"type": "object", "description": "Numbers of tasks, by reason."},
                **dict.fromkeys(("reached", "starts_until"), _TIME),
                "finished": {
                    "type": "boolean",
                    "description": "False if there may be more: make the same call again.",
                },
            },
        },
        "Error": _object({"error": _TEXT, "type": _TEXT, "status": {"type": "integer"}}),
    }


def document(root: str) -> dict[str, Any]:
    """Return the OpenAPI document of the API that is at ``root``, such as ``/taskx/api``."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "TaskX dashboard", "version": taskx.__version__},
        "servers": [{"url": root}],
        "paths": {f"/{call.name}": {call.method.lower(): _operation(call)} for call in CALLS},
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"password": {"type": "http", "scheme": "basic"}},
        },
        "security": [{"password": []}, {}],
    }


def _operation(call: Call) -> dict[str, Any]:
    kind = "application/x-ndjson" if call.answer == "Lines" else "application/json"
    answers = {"200": _content(call.about, call.answer, kind)}
    if call.name == "health":
        answers["503"] = _content("Something is wrong.", call.answer)
    found: dict[str, Any] = {
        "operationId": call.name,
        "summary": call.about,
        "description": f"Needs the permission {call.permission}.",
        "responses": {**answers, "default": _content("An error, in one line.", "Error")},
    }
    if call.parameters:
        found["parameters"] = [*map(_parameter, call.parameters)]
    if call.body:
        found["requestBody"] = {**_content("", call.body), "required": True}
        del found["requestBody"]["description"]
    return found


def _parameter(parameter: Parameter) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": parameter.type}
    if parameter.repeated:
        schema = {"type": "array", "items": schema}
    if parameter.name.endswith("."):  # all names that begin with it
        beginning = f"^{re.escape(parameter.name)}"
        schema = {
            "type": "object",
            "patternProperties": {beginning: schema},
            "additionalProperties": False,
        }
    return {
        "name": parameter.name.rstrip("."),
        "in": "query",
        "description": parameter.about,
        "required": parameter.required,
        "schema": schema,
    }


def _content(about: str, schema: str, kind: str = "application/json") -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{schema}"}
    return {"description": about, "content": {kind: {"schema": reference}}}
