"""The parts of tasks that not everybody may see: params, results, checkpoints and logs."""

from __future__ import annotations

import json
from typing import Any

import attrs

from taskx.programs.dashboard.request import Request
from taskx.tasks.model import Attempt, Task, TaskFilter
from taskx.tasks.redact import is_secret

#: The text that stands for a value that is redacted because of its key.
HIDDEN = "***"
#: The fields of a task that need the permission ``see_params``.
FIELDS = ("params", "result", "checkpoints", "log")
# JSON text can be nested more deeply than Python calls can.
_DEEPEST = 100
# The params that a list shows of a task, and the characters of each.
_GIST, _LONG = 4, 40


def redacted(value: Any, words: tuple[str, ...], depth: int = 0) -> Any:
    """Return JSON values without those whose key contains one of the words, or that have none if all do."""
    if depth > _DEEPEST:
        return "…"
    if isinstance(value, dict):
        return {
            key: HIDDEN if is_secret(str(key), words) else redacted(item, words, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted(item, words, depth + 1) for item in value]
    return HIDDEN if value is not None and is_secret("", words) else value


def visible(request: Request, task: Task) -> Task:
    """Return a task with the parts that the user may see; the others are empty."""
    words = request.queue.config.redact
    if not request.may("see_params"):
        return attrs.evolve(
            task,
            params={},
            result=None,
            checkpoints=None,
            log="",
            earlier_attempts=[_with_old(attempt, None) for attempt in task.earlier_attempts],
        )
    return attrs.evolve(
        task,
        params=redacted(task.params, words),
        result=redacted(task.result, words),
        checkpoints=redacted(task.checkpoints, words),
        earlier_attempts=[
            _with_old(attempt, redacted(attempt.old_params, words))
            for attempt in task.earlier_attempts
        ],
    )


def _with_old(attempt: Attempt, old_params: Any) -> Attempt:
    return attempt if attempt.old_params is None else attrs.evolve(attempt, old_params=old_params)


def gist(request: Request, task: Task) -> str:
    """Return the first params of a task in a few words; empty if the user may not see them."""
    if not request.may("see_params"):
        return ""
    shown = []
    for key, value in [*task.params.items()][:_GIST]:
        seen = HIDDEN if is_secret(str(key), request.queue.config.redact) else value
        if isinstance(seen, (dict, list)):
            seen = "{…}" if isinstance(seen, dict) else f"[{len(seen)}]"
        text = seen if isinstance(seen, str) else json.dumps(seen)
        shown.append(
            f"{str(key)[:_LONG]}={text if len(text) <= _LONG else text[: _LONG - 1] + '…'}"
        )
    return " ".join(shown).encode("utf-8", "backslashreplace").decode()


def as_json(request: Request, task: Task) -> dict[str, Any]:
    """Return a task as JSON values, without the fields that the user may not see."""
    data = visible(request, task).to_dict()
    if not request.may("see_params"):
        for name in FIELDS:
            del data[name]
    return data


def check_search(request: Request, filter: TaskFilter) -> None:
    """Check that a filter does not find out values that the user may not see.

    Raises:
        Forbidden: it does.
    """
    if filter.params is None:
        return
    request.require("see_params")
    for path, _ in filter.params:
        if any(is_secret(key, request.queue.config.redact) for key in path):
            request.refuse(
                request.say(
                    "The filter looks for “{path}”, which is redacted.", path=".".join(path)
                )
            )
