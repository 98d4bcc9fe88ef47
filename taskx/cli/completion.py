"""Completion of ids, types, filters and names in the shell. The reads are bounded; a failure is silent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import click
from click.shell_completion import CompletionItem

from taskx.cli.opening import opened
from taskx.core.model import TaskStatus
from taskx.inspecting.query import FIELDS
from taskx.queue import Queue

#: Most ids that are offered.
MOST = 50
# Seconds that a completion may read.
_PATIENCE = 1.0

Completion = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _completion(find: Callable[[Queue, str], Iterable[CompletionItem]]) -> Completion:
    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        with (
            suppress(Exception, SystemExit),
            opened(ctx) as queue,
            queue.repository.within(_PATIENCE),
        ):
            return [item for item in find(queue, incomplete) if _safe(item)]
        return []

    return complete


def _safe(item: CompletionItem) -> bool:
    """Return True if a value can be offered: the shells' protocols are lines of text."""
    return bool(item.value) and str(item.value).isprintable()


def _ids(queue: Queue, incomplete: str) -> Iterable[CompletionItem]:
    for task in queue.list_tasks(id_prefix=incomplete, limit=MOST, at_most=1).tasks:
        words = f"{task.type}, {task.status}"
        yield CompletionItem(task.id, help=words if words.isprintable() else task.status.value)


def types_of(queue: Queue) -> list[str]:
    """Return the types that are known: those of nodes, and of tasks that were read."""
    nodes = [type for node in queue.repository.nodes() for type in node.types]
    return sorted({*nodes, *queue.stats(at_most=1000).types})


def _types(queue: Queue, incomplete: str) -> Iterable[CompletionItem]:
    return (CompletionItem(type) for type in types_of(queue) if type.startswith(incomplete))


def _schedules(queue: Queue, incomplete: str) -> Iterable[CompletionItem]:
    return (CompletionItem(name) for name in queue.schedules() if name.startswith(incomplete))


def complete_filter(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete a term of a filter: its field, or its value."""
    field, colon, value = incomplete.partition(":")
    if not colon:
        return [
            CompletionItem(name if name.endswith(".") else f"{name}:", help=words)
            for name, words in FIELDS.items()
            if name.startswith(field)
        ]
    if field == "status":
        values: list[str] = [status.value for status in TaskStatus if status.startswith(value)]
    elif field == "type":
        values = [item.value for item in complete_types(ctx, param, value)]
    elif field in ("id", "parent"):
        values = [item.value for item in complete_ids(ctx, param, value)]
    else:
        values = []
    return [CompletionItem(f"{field}:{found}") for found in values if not set(found) & set(' "')]


complete_ids = _completion(_ids)
complete_types = _completion(_types)
complete_schedules = _completion(_schedules)
