"""Completion of ids, types, filters and names in the shell. The reads are bounded; a failure is silent."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from taskx.insight.query import FIELDS
from taskx.programs.cli.opening import opened
from taskx.queue.queue import Queue
from taskx.tasks.model import TaskStatus

#: Most ids that are offered.
MOST = 50
# Seconds that a completion may read.
_PATIENCE = 1.0

# Characters that no shell treats in a special way.
_SAFE = re.compile(r"[\w@%+=:,./-]+")

Completion = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _completion(find: Callable[[Queue, str], Iterable[CompletionItem]]) -> Completion:
    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        with (
            suppress(Exception, SystemExit),  # an error would be printed into the user's command
            opened(ctx) as queue,
            queue.repository.house.within(_PATIENCE),
        ):
            return [item for item in find(queue, incomplete) if _safe(item)]
        return []

    return complete


def _safe(item: CompletionItem) -> bool:
    """Return True if a value can be offered: a shell inserts it as it is."""
    return _SAFE.fullmatch(item.value) is not None


def _ids(queue: Queue, incomplete: str) -> Iterable[CompletionItem]:
    for task in queue.list_tasks(id_prefix=incomplete, limit=MOST, at_most=1).tasks:
        words = f"{task.type}, {task.status}"
        yield CompletionItem(task.id, help=words if words.isprintable() else task.status.value)


def types_of(queue: Queue) -> list[str]:
    """Return the types that are known: those of nodes, and of tasks that were read or counted."""
    nodes = [type for node in queue.repository.nodes() for type in node.types]
    return sorted({*nodes, *queue.stats(period="1w", at_most=1000).types})


def _types(queue: Queue, incomplete: str) -> Iterable[CompletionItem]:
    return (CompletionItem(type) for type in types_of(queue) if type.startswith(incomplete))


def _schedules(queue: Queue, incomplete: str) -> Iterable[CompletionItem]:
    return (CompletionItem(name) for name in queue.schedules() if name.startswith(incomplete))


def _nodes(queue: Queue, incomplete: str) -> Iterable[CompletionItem]:
    found = (node for node in queue.nodes() if node.id.startswith(incomplete))
    return (CompletionItem(node.id, help=node.name) for node in found)


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
    return [CompletionItem(f"{field}:{found}") for found in values]


complete_ids = _completion(_ids)
complete_types = _completion(_types)
complete_schedules = _completion(_schedules)
complete_nodes = _completion(_nodes)


# --- bash

_BASH = """\
%(complete_func)s() {
    local line="${COMP_LINE:0:COMP_POINT}" current="" kind value response
    local -a words
    read -ra words <<< "$line"
    local number=${#words[@]}
    if [[ $line != *[[:space:]] ]]; then
        number=$((number - 1))
        current="${words[number]}"
    fi
    response=$(env COMP_WORDS="$line" COMP_CWORD="$number" %(complete_var)s=bash_complete "$1")
    COMPREPLY=()
    while IFS=, read -r kind value; do
        [[ $kind == plain ]] || continue
        # Bash keeps what is before a colon in the line.
        [[ $COMP_WORDBREAKS == *:* && $current == *:* ]] && value="${value#"${current%%%%:*}:"}"
        [[ $value == *[:.] ]] && compopt -o nospace 2> /dev/null
        COMPREPLY+=("$value")
    done <<< "$response"
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _Bash(BashComplete):
    """Completion in bash of words with colons, at which bash begins a new word."""

    source_template = _BASH


def use_own_bash() -> None:
    """Use this module's completion for bash, in the process of the command ``taskx``."""
    add_completion_class(_Bash)
