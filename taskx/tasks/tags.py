"""Tags of tasks, and how a record stores them together with the id of a task's flow.

The column ``tags`` of a row is a JSON list of labels: the tags of the task and, if the task is part of a
flow, the label of that flow. So one index finds tasks by their tags and by their flow. The label of a flow
has a space, which no tag can have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from taskx.tasks import payload
from taskx.tasks.errors import ConfigurationError

#: Most tags of a task.
MAX_TAGS = 20
#: Longest tag, in characters.
MAX_TAG = 64
#: The label of a flow is this, and the flow's id.
FLOW = "flow "
# The tag of a trace, with a ``traceparent`` of the W3C.
_TRACE = re.compile(r"trace:[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def without_trace(tags: Iterable[str]) -> list[str]:
    """Return the tags for a list of tasks: not the one that tracing has added."""
    return [tag for tag in tags if not _TRACE.fullmatch(tag)]


def check_tag(value: Any) -> str:
    """Return a valid tag: 1 to 64 characters, without white space and control characters.

    Raises:
        ConfigurationError: the value is not a tag.
    """
    if not isinstance(value, str):
        raise ConfigurationError(f"a tag must be a str, not {type(value).__name__}")
    text = value if type(value) is str else str.__str__(value)
    if not 0 < len(text) <= MAX_TAG:
        raise ConfigurationError(f"a tag must have 1 to {MAX_TAG} characters, not {len(text)}")
    if not text.isprintable() or " " in text:  # of all white space, only a space is printable
        raise ConfigurationError(
            f"the tag {text!a} contains white space or a control character; use a hyphen instead"
        )
    return text


def check_tags(values: Any, what: str = "tags") -> tuple[str, ...]:
    """Return valid tags in the given order, each once.

    Raises:
        ConfigurationError: the value is not a list of tags, or there are more than 20.
    """
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping)):
        raise ConfigurationError(
            f"{what} must be a list of texts, such as ['nightly'], not {values!r:.80}"
        )
    tags = tuple(dict.fromkeys(check_tag(value) for value in values))
    if len(tags) > MAX_TAGS:
        raise ConfigurationError(f"a task has at most {MAX_TAGS} tags, not {len(tags)}")
    return tags


def as_tags(value: Any) -> tuple[str, ...] | None:
    """Return the tags that a filter is given: one tag, or a list of them; None for no tags."""
    if value is None:
        return None
    return check_tags((value,) if isinstance(value, str) else value, "tag") or None


def check_flow(value: Any, what: str = "flow") -> str:
    """Return a text that can be the id of a flow. Raises ConfigurationError if it is not one."""
    if not isinstance(value, str):
        raise ConfigurationError(f"{what} must be the id of a flow, not {value!r:.80}")
    if not 0 < len(value) <= MAX_TAG or not value.isprintable() or " " in value:
        raise ConfigurationError(
            f"{what} must be the id of a flow, as FlowHandle.id has it, not {value!a:.80}"
        )
    return value


def labels_to_text(tags: Iterable[str], flow: str = "") -> str | None:
    """Return the labels of a task as JSON text; None if it has neither tags nor a flow."""
    labels = [*tags, *([FLOW + flow] if flow else [])]
    return payload.encode(labels, "tags", max_size=payload.NO_LIMIT) if labels else None


def labels_from_text(text: str) -> list[str]:
    """Return the labels of a text from :func:`labels_to_text`. Raises ``ValueError`` for another text."""
    labels = payload.loads(text)
    if type(labels) is not list or not all(type(label) is str for label in labels):
        raise ValueError(f"{text!r:.50} is not a list of tags")
    return labels


def labels_of(text: Any) -> list[str]:
    """Return the labels in a column ``tags``; an empty list if the column is empty or damaged."""
    try:
        return labels_from_text(text) if text else []
    except (ValueError, TypeError, RecursionError):
        return []


def split(labels: Iterable[str]) -> tuple[tuple[str, ...], str]:
    """Return the tags among labels, and the id of the flow; an empty text if they name no flow."""
    tags, flow = [], ""
    for label in labels:
        if label.startswith(FLOW):
            flow = label[len(FLOW) :]
        else:
            tags.append(label)
    return tuple(tags), flow


def with_more(text: str | None, more: Iterable[str]) -> str | None:
    """Return the text of a column ``tags`` with further tags.

    Raises:
        ConfigurationError: there are more than 20 then.
    """
    tags, flow = split(labels_of(text))
    return labels_to_text(check_tags((*tags, *more)), flow)
