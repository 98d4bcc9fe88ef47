"""Controls: what people have set for the nodes of a repository. Each control is a note.

There are pauses, the declared limits, overrides of limits and numbers of workers, limits that are held, and
requests to single nodes. The names of the notes share a prefix, so that a node reads all of them at once.
The prefix is as old as the pauses, which came first. The overridden limits of a type are kept as
``Queue.tune`` takes them: a mapping that has only the options that are overridden. Those with a name are
kept in the same form.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import attrs

from taskx.stores.base import Repository
from taskx.tasks.checks import check_int, check_number
from taskx.tasks.clock import LAST
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.ids import new_id
from taskx.tasks.model import check_key
from taskx.tasks.options import LimitOptions, NamedOptions, Options, refuse_unknown
from taskx.tasks.rate import (
    MOST_TURNS,
    NO_RATES,
    Limit,
    bursts_as_given,
    check_share,
    is_key,
    rates_as_given,
    rates_of,
)
from taskx.tasks.writes import Note

_PAUSE = "pause"
_OVERRIDES = "pause.overrides"
_DECLARED = "pause.limits"
_HOLDS = "pause.holds"
#: The prefix of the names of requests.
REQUEST = "pause.request/"
#: The kinds of requests.
STACKS, STOP = "stacks", "stop"
#: The options of a type that can be overridden.
LIMITS = ("max_concurrency", "rate", "burst", "limit_scope")
#: Limits with a name, each as its options.
Declared = Mapping[str, LimitOptions]
#: Most workers of a node.
MOST_WORKERS = 10_000


@attrs.frozen
class Paused:
    """The paused types. It is false if nothing is paused; ``"type" in paused`` checks one type.

    Attributes:
        everything: True if the whole queue is paused.
        types: the types that are paused individually.
    """

    everything: bool = False
    types: frozenset[str] = frozenset()

    def __contains__(self, type: str) -> bool:
        return self.everything or type in self.types

    def __bool__(self) -> bool:
        return self.everything or bool(self.types)


@attrs.frozen
class Overrides:
    """All overrides of a repository. It is false if there are none.

    Attributes:
        types: the overridden limits of each type.
        workers: the number of workers of each node; None: the number that its program configured.
        nodes: the number of workers of single nodes, by their ids.
        limits: the overridden options of each limit with a name.
    """

    types: Mapping[str, LimitOptions] = attrs.field(factory=dict, hash=False)
    workers: int | None = None
    nodes: Mapping[str, int] = attrs.field(factory=dict, hash=False)
    limits: Declared = attrs.field(factory=dict, hash=False)

    def __bool__(self) -> bool:
        return bool(self.types or self.nodes or self.limits) or self.workers is not None

    def workers_of(self, node: str, configured: int) -> int:
        """Return the number of workers that a node shall have."""
        return self.nodes.get(node, configured if self.workers is None else self.workers)

    def options_of(self, type: str | None, limit: str | None) -> LimitOptions:
        """Return the overridden options of a type, or else of the limit with a name."""
        options = self.types.get(type) if type is not None else self.limits.get(limit or "")
        return options or {}

    def with_limit(self, type: str | None, limit: str | None, options: LimitOptions) -> Overrides:
        """Return these overrides with other ones of a type, or else of a limit; none if they are empty."""
        known = self.limits if type is None else self.types
        changed = {**known, type or limit or "": options}
        left = {name: some for name, some in changed.items() if some}
        return attrs.evolve(self, limits=left) if type is None else attrs.evolve(self, types=left)

    def with_workers(self, workers: int | None, node: str | None = None) -> Overrides:
        """Return these overrides with another number of workers, of all nodes or of one."""
        if node is None:
            return attrs.evolve(self, workers=workers)
        nodes = {name: number for name, number in self.nodes.items() if name != node}
        return attrs.evolve(self, nodes=nodes if workers is None else {**nodes, node: workers})

    def to_text(self) -> str:
        """Return them as JSON text."""
        return json.dumps(attrs.asdict(self))


class Hold(NamedTuple):
    """A limit lets nothing start until a moment; then its rates count as if all tokens were just taken.

    Attributes:
        until: that moment, in milliseconds.
        full: the moment at which its rates are full again, and nothing is left of the hold.
        by: the id of the task that was refused; empty if it is held by hand.
    """

    until: int
    full: int
    by: str = ""


class Request(NamedTuple):
    """A request to a node.

    Attributes:
        node: the id of the node.
        id: the id of the request.
        what: the kind of the request.
        note: its note.
    """

    node: str
    id: str
    what: str
    note: Note

    @property
    def name(self) -> str:
        """The name of its note."""
        return f"{REQUEST}{self.node}/{self.id}"


class Controls:
    """Reads and changes the controls of a repository."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._refreshing = threading.Lock()
        # The texts of the known overrides, of the declared limits and of the holds.
        self._text: tuple[str | None, ...] = (None, None, None)
        #: The pauses as they were at the last refresh.
        self.paused = Paused()
        #: The overrides as they were at the last refresh.
        self.overrides = Overrides()
        #: The limits that programs have declared, as they were at the last refresh.
        self.declared: Declared = {}
        #: The limits that are held, or were a short time ago, as they were at the last refresh.
        self.holds: Mapping[str, Hold] = {}
        #: The requests to all nodes as they were at the last refresh.
        self.requests: Sequence[Request] = ()

    def read_paused(self) -> Paused:
        """Read the current pauses from the repository."""
        return _paused(self._repository.notes(_PAUSE))

    def read_overrides(self) -> Overrides:
        """Read the current overrides from the repository."""
        note = self._read_note(_OVERRIDES)
        return Overrides() if note is None else from_text(note.text)

    def refresh(self) -> bool:
        """Read all controls again. Return True if the pauses changed."""
        # Else a thread that read before a change might set its result after another one that read later.
        with self._refreshing:
            notes = self._repository.notes(_PAUSE)
            text = tuple(
                notes[name].text if name in notes else None
                for name in (_OVERRIDES, _DECLARED, _HOLDS)
            )
            known, declared, holds = text
            if (known, declared) != self._text[:2]:
                self.overrides = Overrides() if known is None else from_text(known)
                self.declared = declared_from_text(declared)
            if holds != self._text[2]:
                self.holds = holds_from_text(holds)
            self._text = text
            self.requests = _requests(notes)
            before, self.paused = self.paused, _paused(notes)
            return self.paused != before

    # --- pauses

    def pause(self, type: str | None) -> None:
        """Pause a type, or with None everything.

        Raises ``ConfigurationError`` if the repository cannot store pauses.
        """
        self._repository.put_note(_pause(type), "", 0)  # does nothing if it is already paused

    def resume(self, type: str | None) -> None:
        """Lift the pause of a type, or with None the pause of everything."""
        name = _pause(type)
        while note := self._read_note(name):
            if self._repository.put_note(name, None, note.version):
                break

    # --- overrides

    def override(self, change: Callable[[Overrides], Overrides]) -> None:
        """Change the overrides.

        Raises ``ConfigurationError`` if the repository cannot store overrides.
        """
        done = False
        while not done:
            note = self._read_note(_OVERRIDES)
            wanted = change(Overrides() if note is None else from_text(note.text))
            if note is None and not wanted:
                return
            text = wanted.to_text() if wanted else None
            done = self._repository.put_note(_OVERRIDES, text, note.version if note else 0)

    def read_declared(self) -> Declared:
        """Read the declared limits from the repository."""
        note = self._read_note(_DECLARED)
        return declared_from_text(None if note is None else note.text)

    def declare(self, limits: Declared, others: Collection[str]) -> None:
        """Store the limits that a program declares, and forget those that neither it nor others declare."""
        done = False
        while not done:
            note = self._read_note(_DECLARED)
            known = declared_from_text(None if note is None else note.text)
            left = {name: options for name, options in known.items() if name in others}
            wanted = {**left, **limits}
            if wanted == known:
                return
            text = json.dumps(wanted) if wanted else None
            done = self._repository.put_note(_DECLARED, text, note.version if note else 0)

    # --- holds

    def held_until(self, name: str) -> int:
        """Return the time until which a limit is or was held, in milliseconds; 0 if nothing is left of it.

        A key is held, too, if the limit of a beginning is.
        """
        if not self.holds:
            return 0
        found = self.holds.get(name)
        until = 0 if found is None else found.until
        if is_key(name):
            for start, hold in self.holds.items():
                if start.endswith(":") and name.startswith(start):
                    until = max(until, hold.until)
        return until

    def held(self, now: int) -> tuple[str, ...]:
        """Return the limits that are held now, and forget the holds of which nothing is left."""
        holds = before = self.holds
        if any(hold.full <= now for hold in holds.values()):
            holds = {name: hold for name, hold in holds.items() if hold.full > now}
            with self._refreshing:  # another thread may have found other ones meanwhile
                if self.holds is before:
                    self.holds = holds
        return tuple(name for name, hold in holds.items() if hold.until > now)

    def hold(self, holds: Mapping[str, Hold], now: int) -> list[str]:
        """Hold limits, each one at least as long as before; return those that are held longer now."""
        return self._hold(
            lambda known: {
                name: hold
                for name, hold in holds.items()
                if name not in known or known[name].until < hold.until
            },
            now,
        )

    def release(self, name: str, now: int) -> bool:
        """Let a held limit go on now, without a burst; return False if it is not held."""

        def released(known: Mapping[str, Hold]) -> dict[str, Hold]:
            hold = known.get(name)
            if hold is None or hold.until <= now:
                return {}
            return {name: hold._replace(until=now, full=now + hold.full - hold.until)}

        return bool(self._hold(released, now))

    def _hold(
        self, change: Callable[[Mapping[str, Hold]], Mapping[str, Hold]], now: int
    ) -> list[str]:
        """Change holds, and leave out those of which nothing is left; return the changed ones."""
        while True:
            note = self._read_note(_HOLDS)
            known = holds_from_text(None if note is None else note.text)
            changed = change(known)
            if not changed:
                return []
            left = {name: hold for name, hold in known.items() if hold.full > now}
            text = json.dumps({**left, **changed})
            if self._repository.put_note(_HOLDS, text, note.version if note else 0):
                return [*changed]

    # --- requests

    def request(self, node: str, what: str) -> Request:
        """Ask a node for something."""
        request = Request(node, new_id(), what, Note(what, 0))
        self._repository.put_note(request.name, what, 0)
        return request

    def withdraw(self, request: Request) -> None:
        """Take a request back, if the node has not taken it yet."""
        if note := self._read_note(request.name):
            self._repository.put_note(request.name, None, note.version)

    def _read_note(self, name: str) -> Note | None:
        return self._repository.notes(name).get(name)


def _pause(type: str | None) -> str:
    return _PAUSE if type is None else f"{_PAUSE}/{check_key(type, 'type')}"


def _paused(notes: Mapping[str, Note]) -> Paused:
    start = len(_PAUSE) + 1
    types = frozenset(name[start:] for name in notes if name.startswith(_PAUSE + "/"))
    return Paused(_PAUSE in notes, types)


def _requests(notes: Mapping[str, Note]) -> list[Request]:
    found = []
    for name, note in notes.items():
        if name.startswith(REQUEST):
            node, _, request = name.removeprefix(REQUEST).partition("/")
            found.append(Request(node, request, note.text, note))
    return found


# --- overrides


def from_text(text: str) -> Overrides:
    """Return the overrides of a note; leave out what is damaged, or of a newer version."""
    try:
        known = json.loads(text)
        workers = known["workers"]
        return Overrides(
            _known_options(known["types"]),
            None if workers is None else check_workers(workers),
            {node: check_workers(number) for node, number in known["nodes"].items()},
            _known_options(known.get("limits", {})),
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return Overrides()


def declared_from_text(text: str | None) -> Declared:
    """Return the declared limits of a note; leave out what is damaged."""
    try:
        return _known_options(json.loads(text)) if text else {}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def holds_from_text(text: str | None) -> dict[str, Hold]:
    """Return the holds of a note; leave out what is damaged."""
    found = {}
    try:
        for name, (until, full, by) in json.loads(text or "{}").items():
            if type(until) is type(full) is int and 0 <= until <= LAST and type(by) is str:
                found[name] = Hold(until, full, by)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return found


def check_workers(number: Any) -> int:
    """Return a number of workers.

    Raises:
        ConfigurationError: it is not valid.
    """
    return check_int(number, "workers", 1, MOST_WORKERS)


def check_limits(limits: Mapping[str, Any]) -> LimitOptions:
    """Return overridden limits in the form in which they are stored.

    Raises:
        ConfigurationError: a value is not valid.
    """
    checked: Any = {name: limits[name] for name in LIMITS if name in limits}
    Options(**checked)
    if isinstance(rate := checked.get("rate"), list):
        checked["rate"] = [_in_seconds(one) for one in rate]
    elif isinstance(rate, tuple):
        checked["rate"] = _in_seconds(rate)
    if "share" in limits:
        checked["share"] = check_share(limits["share"])
    return checked  # type: ignore[no-any-return]


def _in_seconds(rate: Any) -> Any:
    if not isinstance(rate, tuple):
        return rate
    count, period = rate
    return count, check_number(period, "the period of a rate")


def _known_options(known: Any) -> Declared:
    found = {name: _known_limits(limits) for name, limits in known.items()}
    return {name: limits for name, limits in found.items() if limits}


def _known_limits(limits: Any) -> LimitOptions:
    if isinstance(rate := limits.get("rate"), list):  # JSON has lists only
        pairs = [tuple(one) if isinstance(one, list) else one for one in rate]
        plain = bool(rate) and isinstance(rate[0], (int, float))
        limits = {**limits, "rate": tuple(rate) if plain else pairs}
    try:
        return check_limits(limits)
    except ConfigurationError:
        return {}


def check_named(options: Mapping[str, Any]) -> LimitOptions:
    """Return the options of a limit with a name as they are stored: those that are not None.

    Raises:
        ConfigurationError: an option is not valid, or there is neither a concurrency, nor a rate, nor a
            share.
    """
    checked: Any = check_limits(options)
    given = {name: value for name, value in checked.items() if value is not None}
    of_type = {name: value for name, value in given.items() if name != "share"}
    if Options(**of_type).own_limit is None and "share" not in given:
        raise ConfigurationError("a limit requires concurrency or rate, or share for keys")
    return given  # type: ignore[return-value]


def named_options(options: LimitOptions) -> NamedOptions:
    """Return the options of a limit with a name as :meth:`Queue.limit` takes them."""
    named: Any = {_OF_NAMED.get(name, name): value for name, value in options.items()}
    return named  # type: ignore[no-any-return]


def from_named(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that :meth:`Queue.limit` takes by the names of those that are stored.

    Raises:
        TypeError: there is no such option.
        ConfigurationError: a key would have too many turns, or no key could have the share.
    """
    refuse_unknown(options, NamedOptions, "limit")
    most = options.get("concurrency")
    if is_key(name) and type(most) is int and most > MOST_TURNS:
        raise ConfigurationError(f"concurrency of a key must be at most {MOST_TURNS}, not {most}")
    if options.get("share") and not is_key(name):
        raise ConfigurationError(
            f"share divides the workers between keys, and {name!r} is no limit of keys: its name must have "
            "a colon"
        )
    return {"max_concurrency" if name == "concurrency" else name: n for name, n in options.items()}


_OF_NAMED = {"max_concurrency": "concurrency"}


def overridden(own: Options, limits: LimitOptions) -> Limit | None:
    """Return the limits of an executor with these options, of which ``limits`` are overridden.

    Raises:
        ConfigurationError: the executor's own limits do not fit together.
    """
    given = own.own_limit
    return given if not limits else _limit({name: getattr(own, name) for name in LIMITS}, limits)


def named_limit(own: LimitOptions, limits: LimitOptions) -> Limit | None:
    """Return the limit with a name that has these options, of which ``limits`` are overridden."""
    limit = _limit(own, limits)
    return None if limit is None else limit._replace(scope="global")


def _limit(own: Mapping[str, Any], limits: LimitOptions) -> Limit | None:
    wanted: dict[str, Any] = {**dict.fromkeys(LIMITS), **own, **limits}
    most, rate, share = wanted["max_concurrency"], wanted["rate"], wanted.get("share")
    if most is None and rate is None and share is None:
        return None
    try:
        rates = NO_RATES if rate is None else rates_of(rate, wanted["burst"])
    except ConfigurationError:  # the burst is that of other rates
        rates = rates_of(rate, None)
    return Limit(most, rates, wanted["limit_scope"] or "node", share)


def options_of_limit(limit: Limit | None) -> LimitOptions:
    """Return limits as the options that set them; empty for no limits."""
    if limit is None:
        return {}
    options: LimitOptions = {}
    if limit.max_concurrency is not None:
        options["max_concurrency"] = limit.max_concurrency
    if limit.rates:
        options["rate"] = rates_as_given(limit.rates)
        options["burst"] = bursts_as_given(limit.rates)
    options["limit_scope"] = limit.scope
    return options
