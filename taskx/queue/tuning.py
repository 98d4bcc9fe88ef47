"""Tuning: change the limits of types and the numbers of workers while queues run."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

import attrs

from taskx.attempt.registry import Registry
from taskx.stores import queries
from taskx.stores.base import Repository
from taskx.stores.controls import (
    LIMITS,
    Controls,
    Hold,
    Overrides,
    check_limits,
    check_workers,
    from_named,
    named_options,
    options_of_limit,
)
from taskx.tasks.checks import Duration, check_number
from taskx.tasks.clock import Clock, to_ms
from taskx.tasks.errors import ConfigurationError, NodeNotFound
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import check_key
from taskx.tasks.options import LimitOptions, NamedOptions, check_limit_name, check_time
from taskx.tasks.rate import OF_TYPE, is_key
from taskx.tasks.retry import MAX_WAIT


@attrs.frozen(kw_only=True)
class TunedType:
    """The overridden limits of a type.

    Attributes:
        limits: the limits that are overridden, as :meth:`Queue.tune` takes them.
        own: the limits of the type's executor, of which ``limits`` are overridden; None if neither this
            queue nor a running one has an executor for the type.
    """

    limits: LimitOptions
    own: LimitOptions | None


@attrs.frozen(kw_only=True)
class Tuned:
    """The stored overrides: see :meth:`Queue.tuned`. It is false if there are none.

    Attributes:
        types: the types whose limits are overridden.
        limits: the overridden options of each limit with a name, as :meth:`Queue.tune` takes them.
        workers: the number of workers of each node; None if the nodes have the numbers of their programs.
        nodes: the number of workers of single nodes, by their ids.
    """

    types: Mapping[str, TunedType] = attrs.field(factory=dict, hash=False)
    workers: int | None = None
    nodes: Mapping[str, int] = attrs.field(factory=dict, hash=False)
    limits: Mapping[str, NamedOptions] = attrs.field(factory=dict, hash=False)

    def __bool__(self) -> bool:
        return bool(self.types or self.nodes or self.limits) or self.workers is not None

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict of JSON values."""
        return attrs.asdict(self)


def tune(
    repository: Repository,
    controls: Controls,
    type: str | None,
    limit: str | None,
    limits: Mapping[str, Any],
    workers: int | None,
    node: str | None,
) -> None:
    """Store overrides: see :meth:`Queue.tune`."""
    repository.require("overrides")
    _refuse_mixed(type, limit, "tune", workers=workers is not None, node=node)
    names = _options_of(type, limit)
    if unknown := limits.keys() - {*LIMITS, *names}:
        raise TypeError(f"tune() has no option {', '.join(sorted(unknown))}")
    if names:
        if not limits:
            raise ConfigurationError(f"tune() requires a limit: one of {', '.join(names)}")
        wanted = check_limits(limits if limit is None else from_named(limit, limits))

        def merged(known: Overrides) -> Overrides:
            options: Any = {**known.options_of(type, limit), **wanted}
            fitting = check_limits(options) if "burst" in wanted else _fitting(options)
            return known.with_limit(type, limit, fitting)

        controls.override(merged)
        return
    if limits:
        raise ConfigurationError(
            f"{', '.join(limits)} must be of a type: name the type as the first argument"
        )
    number = check_workers(workers)
    if node is not None:
        _refuse_unfit(repository, node)
    controls.override(lambda known: _cleaned(repository, known.with_workers(number, node)))


def untune(
    repository: Repository,
    controls: Controls,
    type: str | None,
    limit: str | None,
    only: Collection[str] | None,
    workers: bool,
    node: str | None,
) -> None:
    """Remove overrides: see :meth:`Queue.untune`."""
    repository.require("overrides")
    _refuse_mixed(type, limit, "untune", workers=workers, node=node)
    options = _options_of(type, limit)
    if not options and only is not None:
        raise ConfigurationError("only names limits of a type: name the type, too")
    names = {*options} if only is None else {only} if isinstance(only, str) else {*only}
    if unknown := names - {*options}:
        raise ConfigurationError(
            f"only must name limits ({', '.join(options)}), not {', '.join(map(repr, unknown))}"
        )
    if not options:
        controls.override(lambda known: _cleaned(repository, known.with_workers(None, node)))
        return
    stored = names if limit is None else {*from_named(limit, dict.fromkeys(names))}

    def without(known: Overrides) -> Overrides:
        left: Any = {
            option: value
            for option, value in known.options_of(type, limit).items()
            if option not in stored
        }
        return known.with_limit(type, limit, _fitting(left))

    controls.override(without)


def _fitting(options: Any) -> LimitOptions:
    """Return overridden limits; without their burst if it is that of other rates."""
    try:
        return check_limits(options)
    except ConfigurationError:
        return check_limits({name: value for name, value in options.items() if name != "burst"})


# The time for which a hold is remembered whose limit this process does not know.
_DAY = 86_400.0


def hold(
    repository: Repository,
    controls: Controls,
    registry: Registry,
    clock: Clock,
    log: GuardedLogger,
    name: str,
    until: datetime | Duration,
) -> None:
    """Store a hold: see :meth:`Queue.hold`."""
    repository.require("holds of limits")
    check_key(name, "the name of a limit")
    now = clock.now_ms()
    if isinstance(until, datetime):
        end = to_ms(check_time(until, "until"))
    else:
        end = now + math.ceil(1000 * min(check_number(until, "until"), MAX_WAIT))
    fill = registry.fill_of(name)
    if fill is None and not (name.startswith(OF_TYPE) or is_key(name)):
        known = {*controls.read_declared(), *controls.read_overrides().limits}
        if name not in known:
            log.warning("no program declares limit %r, which is held now", name)
    full = end + math.ceil(1000 * (_DAY if fill is None else fill))
    controls.hold({name: Hold(end, full)}, now)


def release(repository: Repository, controls: Controls, clock: Clock, name: str) -> bool:
    """Remove a hold: see :meth:`Queue.release`."""
    repository.require("holds of limits")
    return controls.release(check_key(name, "the name of a limit"), clock.now_ms())


def _options_of(type: str | None, limit: str | None) -> tuple[str, ...]:
    """Return the options that a type, or a limit with a name, has; none for workers."""
    if type is not None:
        check_key(type, "type")
        return LIMITS
    if limit is None:
        return ()
    check_limit_name(limit, "limit")
    return tuple(NamedOptions.__annotations__)


def _refuse_unfit(repository: Repository, node: str) -> None:
    """Raise an error if the number of workers of a node cannot be set."""
    found = queries.live_node(repository, node)
    if found is None:
        raise NodeNotFound(node)
    if engine := found.about.engine:
        raise ConfigurationError(
            f"node {found.name} has no workers of its own: set the number of tasks at a time by the "
            f"options of {engine}'s worker"
        )


def _refuse_mixed(
    type: str | None, limit: str | None, what: str, *, workers: bool, node: str | None
) -> None:
    given = (type is not None) + (limit is not None)
    if given > 1 or (given and (workers or node is not None)):
        raise ConfigurationError(
            f"{what}() changes the limits of a type, a limit with a name, or the workers of nodes: make a "
            "call for each"
        )
    if not given and not workers:
        raise ConfigurationError(f"{what}() requires a type, or workers")
    if node is not None:
        check_key(node, "node")


def _cleaned(repository: Repository, known: Overrides) -> Overrides:
    """Return overrides without those of nodes that are gone."""
    if not known.nodes:
        return known
    there = {node.id for node in repository.nodes()}
    nodes = {node: number for node, number in known.nodes.items() if node in there}
    return attrs.evolve(known, nodes=nodes)


def tuned(repository: Repository, registry: Registry) -> Tuned:
    """Return the stored overrides: see ``Queue.tuned``."""
    repository.require("overrides")
    overrides = Controls(repository).read_overrides()
    own: dict[str, Any] = {}
    if overrides.types:
        for node in repository.nodes():
            own.update(node.own_limits)
    for type, entry in registry.registered.copy().items():
        own[type] = entry.options.own_limit
    return Tuned(
        types={
            type: TunedType(limits=limits, own=options_of_limit(own[type]) if type in own else None)
            for type, limits in sorted(overrides.types.items())
        },
        workers=overrides.workers,
        nodes=overrides.nodes,
        limits={name: named_options(options) for name, options in sorted(overrides.limits.items())},
    )
