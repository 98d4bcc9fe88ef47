"""Requests to nodes: a process asks a node of another one to do something.

A request is one of the notes that every node reads with the pauses. The node removes it before it does what
it was asked for. An answer is a note, too, which the asking process removes.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from taskx.node.pool import WorkerPool
from taskx.stores import queries
from taskx.stores.base import Repository
from taskx.stores.controls import REQUEST, STACKS, STOP, Controls, Request
from taskx.tasks.checks import Duration, check_number
from taskx.tasks.errors import ConfigurationError, NodeNotFound, RepositoryError
from taskx.tasks.ids import made_at
from taskx.tasks.model import check_key
from taskx.tasks.timing import Timing
from taskx.tasks.writes import Note

if TYPE_CHECKING:
    from taskx.node.threads import ThreadStack  # loaded when a process is asked for its stacks

_ANSWER = "answer/"


def obey(pool: WorkerPool) -> None:
    """Do what other processes ask a node for, by the requests that were found at the last refresh."""
    for request in pool.controls.requests:
        if request.node == pool.node.id:
            _obey(pool, request)


def _obey(pool: WorkerPool, request: Request) -> None:
    repository = pool.moves.repository
    # First: a request that was withdrawn, or done in an earlier round, must not be answered.
    if not repository.put_note(request.name, None, request.note.version):
        return
    if request.what == STOP:
        pool.ends.asked_to_stop()
    elif request.what == STACKS:
        from taskx.node.threads import stacks_here, to_json

        text = json.dumps(to_json(stacks_here()), ensure_ascii=True)
        repository.put_note(_ANSWER + request.id, text, 0)


def stop_node(repository: Repository, controls: Controls, timing: Timing, node: str) -> None:
    """Ask a node to stop: see :meth:`Queue.stop_node`."""
    repository.require("requests to nodes")
    found = queries.live_node(repository, check_key(node, "node_id"))
    if found is not None and found.serves_broker:
        # If only its queue ended, it would go on to take tickets, and drop them.
        engine = found.about.engine
        raise ConfigurationError(
            f"node {found.name} belongs to a worker of {engine}, which TaskX does not stop: stop that "
            f"worker in the way of {engine}, for example with SIGTERM"
        )
    _ask(repository, controls, timing, node, STOP)


def stacks(
    repository: Repository,
    controls: Controls,
    timing: Timing,
    node: str | None,
    timeout: Duration,
) -> list[ThreadStack]:
    """Return the stacks of a node's threads: see :meth:`Queue.stacks`."""
    from taskx.node.threads import from_json, stacks_here

    seconds = check_number(timeout, "timeout")
    if node is None or repository.liveness.has(check_key(node, "node_id")):
        return stacks_here()
    request = _ask(repository, controls, timing, node, STACKS)
    try:
        note = _wait_for_answer(repository, request, seconds, timing.answer_every)
    except BaseException:
        with suppress(RepositoryError):  # a later request removes it
            controls.withdraw(request)
        raise
    with suppress(RepositoryError):
        repository.put_note(_ANSWER + request.id, None, note.version)
    return from_json(json.loads(note.text))


def _wait_for_answer(
    repository: Repository, request: Request, seconds: float, every: float
) -> Note:
    deadline, name = time.monotonic() + seconds, _ANSWER + request.id
    while (note := repository.notes(name).get(name)) is None:
        if time.monotonic() >= deadline:
            raise TimeoutError(
                f"node {request.node} has not answered within {seconds:g} s: its process may be stopped, "
                "or too busy"
            )
        time.sleep(every)
    return note


def _ask(
    repository: Repository, controls: Controls, timing: Timing, node: str, what: str
) -> Request:
    repository.require("requests to nodes")
    repository.transactions.refuse_write()
    if queries.live_node(repository, node) is None:
        raise NodeNotFound(node)
    _remove_left_behind(repository, timing.forget_requests_after)
    return controls.request(node, what)


def _remove_left_behind(repository: Repository, after: float) -> None:
    """Remove the requests and answers of processes that died or did not wait."""
    before = (time.time() - after) * 1000
    for prefix in (REQUEST, _ANSWER):
        for name, note in repository.notes(prefix).items():
            if made_at(name.rpartition("/")[2]) < before:
                repository.put_note(name, None, note.version)
