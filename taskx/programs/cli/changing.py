"""The commands that change tasks: cancel, requeue, delete, prune, pause, resume."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import click

from taskx.insight.query import query_of
from taskx.programs.cli.asking import key_of
from taskx.programs.cli.completion import complete_filter, complete_ids, complete_types, types_of
from taskx.programs.cli.errors import AWAY, FAILED, Failure, Usage, code_of
from taskx.programs.cli.listing import FILTER_HELP, filter_of
from taskx.programs.cli.opening import Session, TaskId, command
from taskx.programs.cli.output import age, clean, moment
from taskx.programs.cli.values import Duration, Rate, json_object
from taskx.queue.bulk import Bulk
from taskx.tasks.errors import TaskxError
from taskx.tasks.findings import suggestion
from taskx.tasks.model import TaskFilter, TaskStatus
from taskx.tasks.redact import is_secret

# The largest number that is counted before a question.
_COUNTED = 100_000

ASKS = "A change of all that match says how many there are, and asks first."

ids_argument = click.argument(
    "task_ids", metavar="[ID]...", nargs=-1, type=TaskId(), shell_complete=complete_ids
)
where_option = click.option(
    "--where",
    "-w",
    "where",
    metavar="FILTER",
    multiple=True,
    shell_complete=complete_filter,
    help="All tasks that match, instead of ids; may be given several times.",
)
limit_option = click.option("--limit", type=click.IntRange(1), help="At most so many of --where.")
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Only say how many tasks would be changed."
)
bulk_options = (where_option, limit_option, yes_option, dry_run_option)


_COUNTS = "give --yes to do it, or --dry-run to only count"


def confirm(session: Session, question: str, yes: bool, otherwise: str = _COUNTS) -> None:
    """Ask a person before a change. ``otherwise`` says what to do where nobody can be asked.

    Raises:
        Usage: nobody can be asked, and ``--yes`` was not given.
        Failure: the answer is no.
    """
    if yes:
        return
    if not _can_ask():
        raise Usage(f"{question} Nobody can be asked here: {otherwise}")
    if not click.confirm(clean(question), err=True):
        raise Failure("nothing was changed", FAILED)


def _can_ask() -> bool:
    return sys.stdin.isatty()


def change_each(
    session: Session,
    action: str,
    task_ids: Sequence[str],
    change: Callable[[str], str],
    detail: Any = None,
) -> None:
    """Change each task and print the outcome. An error of one task does not keep the others back.

    Args:
        session: the session.
        action: the name of the change, for the log of changes.
        task_ids: the ids of the tasks.
        change: a function that changes one task, and returns what to print.
        detail: more about the change, for the log of changes.

    Raises:
        click.exceptions.Exit: with the code of the first error.
    """
    codes = []
    for task_id in task_ids:
        try:
            outcome = change(task_id)
        except TaskxError as error:
            if (code := code_of(error)) == AWAY:
                raise
            codes.append(code)
            session.out.say(f"taskx: {error}")
            continue
        session.note(action, task_id, detail)
        if session.json:
            session.out.json({"id": task_id, "outcome": outcome})
        else:
            session.out.line(f"{clean(task_id)} {outcome}")
    if codes:
        raise click.exceptions.Exit(codes[0])


# --- all that match


# A bulk change, with the arguments ``dry_run``, ``at_most`` and ``on_progress``.
_Change = Callable[..., Bulk]


def change_all(
    session: Session, action: str, target: str, change: _Change, *, yes: bool, dry_run: bool
) -> None:
    """Change all tasks of a bulk change: say how many, ask, do it, and say what was done."""
    found = change(dry_run=True, at_most=_COUNTED, on_progress=None)
    words = f"{'' if found.exact else 'more than '}{_tasks(found.matched)}"
    if dry_run:
        if session.json:
            session.out.json(found.to_dict())
        else:
            session.out.line(f"{words} would be changed ({action})")
        return
    if found.matched:
        confirm(session, f"{action.capitalize()} {words}?", yes)
    done = _run(session, change, found.matched)
    session.note(action, target, _compact(done))
    if session.json:
        session.out.json(done.to_dict())
    else:
        session.out.line(_summary(session, done))


def _run(session: Session, change: _Change, expected: int) -> Bulk:
    reached: list[Bulk] = []
    shown = sys.stderr.isatty()

    def on_progress(bulk: Bulk) -> None:
        reached[:] = [bulk]
        if shown:
            click.echo(f"\r{bulk.matched} of {max(expected, bulk.matched)} ", nl=False, err=True)

    try:
        return change(dry_run=False, at_most=None, on_progress=on_progress)
    except BaseException:  # also Ctrl-C: the user must know how far it came
        if reached:
            session.out.say(
                f"{_tasks(reached[0].changed)} changed before that; the same call goes on from there"
            )
        raise
    finally:
        if reached and shown:
            click.echo(err=True)


def _tasks(number: int) -> str:
    return f"{number} {'task' if number == 1 else 'tasks'}"


def _compact(done: Bulk) -> dict[str, Any]:
    """Return what the log of changes keeps."""
    return {name: value for name, value in done.to_dict().items() if value and name != "action"}


_DONE = {"cancel": "cancelled", "requeue": "requeued", "delete": "deleted"}
_SKIPPED = {
    "changed": "changed in the meantime",
    "unique_key": "another task holds the unique key",
    "running": "it runs",
    "thread": "a thread of it still runs",
    "needed": "an unfinished task depends on it",
    "asked": "was asked to stop before",
    "answer": "a task has asked for this answer: requeue that one",
}


def _summary(session: Session, done: Bulk) -> str:
    parts = [f"{_tasks(done.changed)} {_DONE[done.action]}"]
    if done.asked:
        parts.append(f"{done.asked} of them run and were asked to stop")
    if done.more:
        parts.append(f"{done.more} more that had ended because of them")
    for reason, number in done.skipped.items():
        parts.append(f"{number} not: {_SKIPPED.get(reason, reason)}")
    if done.starts_until is not None:
        left = (done.starts_until - session.now()).total_seconds()
        parts.append(f"the last one starts in {age(max(0.0, left))}")
    return "; ".join(parts)


def _wanted(
    session: Session, task_ids: Sequence[str], where: Sequence[str], limit: int | None
) -> TaskFilter | None:
    """Return the filter of a bulk change; None if ids are given.

    Raises:
        Usage: neither or both are given.
    """
    if bool(task_ids) is bool(where):
        raise Usage("name the tasks by their ids, or by --where FILTER")
    if task_ids:
        if limit is not None:
            raise Usage("--limit belongs to --where")
        return None
    wanted = filter_of(session, where)
    if not wanted.given:  # perhaps because a variable of the shell is not set
        raise Usage("--where has no condition: give one, such as --where type:email")
    return wanted if limit is None else attrs.evolve(wanted, limit=limit)


def _change(
    session: Session,
    action: str,
    change: Callable[[str], str],
    *,
    task_ids: Sequence[str],
    where: Sequence[str],
    limit: int | None,
    yes: bool,
    dry_run: bool,
    detail: Any = None,
    **options: Any,
) -> None:
    """Change each of the tasks with these ids, or all that match a filter."""
    wanted = _wanted(session, task_ids, where, limit)
    if wanted is None:
        if dry_run:
            raise Usage("--dry-run belongs to --where")
        if options.get("rate") is not None:
            raise Usage("--rate belongs to --where or --group")
        change_each(session, action, task_ids, change, detail)
        return
    change_matching = partial(getattr(session.queue, f"{action}_all"), wanted, **options)
    target = query_of(_without_secrets(session, wanted))
    change_all(session, action, target, change_matching, yes=yes, dry_run=dry_run)


def _without_secrets(session: Session, wanted: TaskFilter) -> TaskFilter:
    """Return a filter whose values of secret params are ``***``, for the log of changes."""
    secret = session.queue.config.redact
    return attrs.evolve(
        wanted,
        params={
            path: "***" if any(is_secret(key, secret) for key in path) else value
            for path, value in wanted.params or ()
        },
    )


@command(
    "cancel",
    f"""Cancel tasks: those with the given ids, or all that match a filter.

A pending task never runs. A running one is asked to stop. {ASKS}

{FILTER_HELP}""",
    """
taskx cancel 019abc12-...
taskx cancel --where 'type:email status:pending older:1d' --dry-run
taskx cancel --where type:email --yes
""",
    ids_argument,
    *bulk_options,
)
def cancel(session: Session, **given: Any) -> None:
    """Cancel tasks."""

    def change(task_id: str) -> str:
        return "cancelled" if session.queue.cancel_task(task_id) else "asked to stop"

    _change(session, "cancel", change, **given)


@command(
    "requeue",
    f"""Run failed or cancelled tasks again: by ids, by a filter, or a group of failures.

A filter without a status means the failed ones. --rate staggers their starts; no process needs to stay
alive for that. --params and --from-step correct a single task. {ASKS}

{FILTER_HELP}""",
    """
taskx requeue 019abc12-...
taskx requeue 019abc12-... --params '{"to": "ann@example.org"}' --from-step charge
taskx requeue --where 'type:email error:Timeout newer:1d' --rate 100/m
taskx requeue --group 57d11975 --yes
""",
    ids_argument,
    *bulk_options,
    click.option("--group", help="A group of `taskx failures`, instead of ids."),
    click.option(
        "--rate",
        type=Rate(),
        metavar="RATE",
        help="Start them one by one at this rate, such as 100/m, the newest first.",
    ),
    click.option("--params", "params_text", metavar="JSON", help="Other params, of one task."),
    click.option("--from-step", help="Forget this step and those after it, of one task."),
)
def requeue(
    session: Session,
    group: str | None,
    rate: str | None,
    params_text: str | None,
    from_step: str | None,
    **given: Any,
) -> None:
    """Requeue tasks."""
    corrected = params_text is not None or from_step is not None
    if corrected and len(given["task_ids"]) != 1:
        raise Usage("--params and --from-step correct one task: give its id")
    if group is not None:
        if given["task_ids"] or given["where"] or given["limit"] is not None:
            raise Usage("--group names the tasks: leave out the ids, --where and --limit")
        _requeue_group(session, group, rate, yes=given["yes"], dry_run=given["dry_run"])
        return
    params = None if params_text is None else json_object(params_text, "--params")

    def change(task_id: str) -> str:
        session.queue.requeue(task_id, params=params, from_step=from_step)
        return "requeued"

    detail = {"params": params is not None, "from_step": from_step} if corrected else None
    _change(session, "requeue", change, detail=detail, rate=rate, **given)


def _requeue_group(
    session: Session, key: str, rate: str | None, *, yes: bool, dry_run: bool
) -> None:
    at_most = 1000
    found = session.queue.failures(at_most=at_most)
    while key not in (groups := {key_of(group): group for group in found}) and not found.complete:
        at_most *= 10
        found = session.queue.failures(at_most=at_most)
    if key not in groups:
        raise Usage(
            f"there is no group {key!r}{suggestion(key, groups)}: taskx failures lists them"
        )

    def change(at_most: int | None, **how: Any) -> Bulk:
        return session.queue.requeue_failures(groups[key], rate=rate, **how)

    change_all(session, "requeue", f"failures {key}", change, yes=yes, dry_run=dry_run)


@command(
    "delete",
    f"""Delete the records of tasks: those with the given ids, or all that match a filter.

Running tasks stay, and tasks on which an unfinished one depends. {ASKS} `taskx prune` deletes what ended
some time ago.

{FILTER_HELP}""",
    """
taskx delete 019abc12-...
taskx delete --where 'type:email status:cancelled' --dry-run
""",
    ids_argument,
    *bulk_options,
)
def delete(session: Session, **given: Any) -> None:
    """Delete tasks."""

    def change(task_id: str) -> str:
        session.queue.delete(task_id)
        return "deleted"

    _change(session, "delete", change, **given)


@command(
    "prune",
    """Delete the records of tasks that ended some time ago.

Tasks stay while a stored task depends on them, or while they hold a unique key for a number of seconds.""",
    """
taskx prune --older 30d --dry-run
taskx prune --older 7d --status completed --yes
""",
    click.option(
        "--older",
        type=Duration(),
        required=True,
        help="Tasks that ended longer ago than this, such as 30d.",
    ),
    click.option(
        "--status",
        type=click.Choice([status.value for status in TaskStatus if status.finished]),
        help="Only tasks with this status.",
    ),
    yes_option,
    dry_run_option,
)
def prune(session: Session, older: float, status: str | None, yes: bool, dry_run: bool) -> None:
    """Delete old tasks."""
    before = session.after(-older)
    ended = [status] if status else [each for each in TaskStatus if each.finished]
    counts = [
        session.queue.count_tasks(TaskFilter(status=each, end_date=before), at_most=_COUNTED)
        for each in ended
    ]
    number = sum(counts)
    capped = any(not count.exact for count in counts)
    words = f"{'more than ' if capped else ''}{number} {'task' if number == 1 else 'tasks'}"
    if dry_run:
        # A task that was submitted before that time may have ended after it.
        _report(
            session, f"at most {words} would be deleted", {"at_most": None if capped else number}
        )
        return
    if number:
        confirm(session, f"Delete up to {words} that ended longer ago?", yes)
    deleted = session.queue.prune(before, status)
    session.note("prune", f"{status or 'ended'} before {moment(before)}", {"deleted": deleted})
    _report(session, f"{deleted} deleted", {"deleted": deleted})


def _report(session: Session, words: str, record: dict[str, Any]) -> None:
    if session.json:
        session.out.json(record)
    else:
        session.out.line(words)


# --- pauses

types_argument = click.argument(
    "types", metavar="[TYPE]...", nargs=-1, shell_complete=complete_types
)


def _wanted_types(types: Sequence[str], everything: bool) -> list[str | None]:
    if everything is bool(types):
        raise Usage("name the types, or give --all for all types")
    return [None] if everything else [*types]


@command(
    "pause",
    """Pause types: none of their tasks starts, in any process, until `taskx resume`.

Running tasks go on. For a type that no node and no task has, it asks first.""",
    """
taskx pause email
taskx pause --all
""",
    types_argument,
    click.option("--all", "everything", is_flag=True, help="Pause all types."),
    yes_option,
)
def pause(session: Session, types: Sequence[str], everything: bool, yes: bool) -> None:
    """Pause types."""
    wanted = _wanted_types(types, everything)
    known = types_of(session.queue)
    if unknown := [name for name in types if name not in known]:
        for name in unknown:
            session.out.say(f"no node and no task has type {name!r}{suggestion(name, known)}")
        confirm(session, f"Pause {', '.join(unknown)}?", yes, "give --yes to do it")
    for type in wanted:
        session.queue.declare(*([] if type is None else [type]))  # else the log would warn, too
        session.queue.pause(type)
        session.note("pause", type or "all types")
        _report(session, f"{_shown(type)} paused", {"type": type, "paused": True})


@command(
    "resume",
    """End the pause of types.

`taskx resume --all` ends `taskx pause --all`; types that were paused by name stay paused.""",
    """
taskx resume email
taskx resume --all
""",
    types_argument,
    click.option("--all", "everything", is_flag=True, help="End the pause of all types."),
)
def resume(session: Session, types: Sequence[str], everything: bool) -> None:
    """Resume types."""
    before = session.queue.paused
    for type in _wanted_types(types, everything):
        session.queue.resume(type)
        if before.everything if type is None else type in before.types:
            session.note("resume", type or "all types")
            _report(session, f"{_shown(type)} resumed", {"type": type, "paused": False})
        else:
            hint = "" if type is None else suggestion(type, before.types)
            session.out.say(f"{_shown(type)} {'were' if type is None else 'was'} not paused{hint}")
            if session.json:
                session.out.json({"type": type, "paused": False})
    after = session.queue.paused
    if after.everything:
        session.out.say("all types are still paused: taskx resume --all ends this")


def _shown(type: str | None) -> str:
    return "all types" if type is None else clean(type)


COMMANDS = (cancel, requeue, delete, prune, pause, resume)
