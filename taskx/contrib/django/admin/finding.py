"""Finding tasks in the admin: filters, search, and a paginator whose cost has a limit."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import Any

from django.contrib import admin
from django.core.paginator import Paginator
from django.db.models import Q

from taskx.contrib.django.models import TagRow
from taskx.tasks import payload
from taskx.tasks.clock import to_ms
from taskx.tasks.model import TaskStatus
from taskx.tasks.redact import redacted
from taskx.tasks.tags import FLOW

#: Most tasks that are counted.
MOST = 10_000
#: The newest tasks that are searched where no index helps.
SEARCHED = 100_000
# Most tasks that a search finds.
_MOST_FOUND = 1_000
# The newest tasks, or tags, whose values a filter offers.
_SEEN = 1_000
_UNITS = {"hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(days=7)}


class AtMost(Paginator):
    """A paginator that counts at most :data:`MOST` rows, so that a page of a large table costs little."""

    @cached_property
    def count(self) -> int:
        """The number of rows, at most :data:`MOST`."""
        number: int = self.object_list.order_by()[:MOST].count()
        return number


class _Choices(admin.SimpleListFilter, ABC):
    """A filter that offers values."""

    def lookups(self, request: Any, model_admin: Any) -> Iterable[tuple[str, str]]:
        """Return the values, each with its text; the chosen one is always among them."""
        values = [*self.values(model_admin.get_queryset(request))]
        chosen = self.used_parameters.get(self.parameter_name)
        return [(value, value) for value in dict.fromkeys([*values, *([chosen] if chosen else [])])]

    @abstractmethod
    def values(self, rows: Any) -> Iterable[str]:
        """Return the values that tasks have."""

    def queryset(self, request: Any, queryset: Any) -> Any:
        """Return the tasks that match."""
        value = self.value()
        return queryset if value is None else self.chosen(queryset, value)

    @abstractmethod
    def chosen(self, rows: Any, value: str) -> Any:
        """Return the tasks that have a value."""


class Status(_Choices):
    """Tasks with a status."""

    title, parameter_name = "status", "status"

    def values(self, rows: Any) -> Iterable[str]:
        return [status.value for status in TaskStatus]

    def chosen(self, rows: Any, value: str) -> Any:
        return rows.filter(status=value)


class Type(_Choices):
    """Tasks of a type: one of the newest tasks."""

    title, parameter_name = "type", "type"

    def values(self, rows: Any) -> Iterable[str]:
        return sorted(set(_newest(rows).values_list("type", flat=True)))

    def chosen(self, rows: Any, value: str) -> Any:
        return rows.filter(type=value)


class QueueName(_Choices):
    """Tasks of Django with a queue name, which is the end of their type."""

    title, parameter_name = "queue name", "queue"

    def values(self, rows: Any) -> Iterable[str]:
        types = _newest(rows).values_list("type", flat=True)
        return sorted({type.partition("@")[2] or "default" for type in types})

    def chosen(self, rows: Any, value: str) -> Any:
        if value == "default":
            return rows.exclude(type__contains="@")
        return rows.filter(type__endswith=f"@{value}")


class Tag(_Choices):
    """Tasks with a tag: one of those that were given last."""

    title, parameter_name = "tag", "tag"

    def values(self, rows: Any) -> Iterable[str]:
        tags = TagRow.objects.using(rows.db).order_by("-pk")[:_SEEN].values_list("tag", flat=True)
        return sorted({tag for tag in tags if not tag.startswith(FLOW)})

    def chosen(self, rows: Any, value: str) -> Any:
        return rows.filter(pk__in=TagRow.objects.using(rows.db).filter(tag=value).values("task"))


class Submitted(_Choices):
    """Tasks that were submitted in the last hour, day or week."""

    title, parameter_name = "submitted in the last", "since"

    def values(self, rows: Any) -> Iterable[str]:
        return _UNITS

    def chosen(self, rows: Any, value: str) -> Any:
        if value not in _UNITS:
            return rows
        since = datetime.now(timezone.utc) - _UNITS[value]
        return rows.filter(created_at__gte=to_ms(since))


def _newest(rows: Any) -> Any:
    return rows.order_by("-pk")[:_SEEN]


def search(rows: Any, words: str, redact: tuple[str, ...]) -> Any:
    """Return the tasks that a search finds, at most 1,000.

    They are the one with this id, those whose id begins so, the holder of this unique key; and of the
    newest 100,000 tasks those with this key, or with this text in their params or error.

    Args:
        rows: the tasks among which to search.
        words: the text.
        redact: the words of keys whose values are not searched.
    """
    words = words.strip()
    if not words:
        return rows
    plain = rows.order_by("-pk").values_list("pk", flat=True)
    found = {*plain.filter(task_id__gte=words, task_id__lt=words + "\U0010ffff")[:_MOST_FOUND]}
    found.update(plain.filter(unique_lock=words)[:_MOST_FOUND])
    newest = rows.order_by("-pk").values_list("pk", flat=True).first() or 0
    recent = rows.filter(pk__gt=newest - SEARCHED).order_by("-pk")
    keys = Q(unique_key=words) | Q(concurrency_key=words) | Q(error__contains=words)
    found.update(recent.filter(keys).values_list("pk", flat=True)[:_MOST_FOUND])
    found.update(_with_params(recent, words, redact))
    return rows.filter(pk__in=sorted(found, reverse=True)[:_MOST_FOUND])


def _with_params(recent: Any, words: str, redact: tuple[str, ...]) -> Iterator[int]:
    """Yield the tasks with a text in their params, but not in a value that is redacted."""
    escaped = json.dumps(words, ensure_ascii=False)[1:-1]
    texts = recent.filter(params__contains=escaped).values_list("pk", "params")
    for pk, text in texts[:_MOST_FOUND]:
        try:
            shown = redacted(payload.loads(text), redact)
        except (ValueError, RecursionError):
            continue
        if escaped in json.dumps(shown, ensure_ascii=False, separators=(",", ":")):
            yield pk
