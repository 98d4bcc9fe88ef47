"""Tuning: change the limits of types and the numbers of workers while queues run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import attrs

from taskx.attempt.registry import Registry
from taskx.node.moving import Services
from taskx.stores import queries
from taskx.stores.base import Repository
from taskx.stores.controls import (
    LIMITS,
    Controls,
    Overrides,
    check_limits,
    check_workers,
    options_of_limit,
)
from taskx.tasks.errors import ConfigurationError, NodeNotFound
from taskx.tasks.model import check_key
from taskx.tasks.options import LimitOptions


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
        workers: the number of workers of each node; None if the nodes have the numbers of their programs.
        nodes: the number of workers of single nodes, by their ids.
    """

    types: Mapping[str, TunedType] = attrs.field(factory=dict, hash=False)
    workers: int | None = None
    nodes: Mapping[str, int] = attrs.field(factory=dict, hash=False)

    def __bool__(self) -> bool:
        return bool(self.types or self.nodes) or self.workers is not None

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict of JSON values."""
        return attrs.asdict(self)


def tune(
    services: Services,
    type: str | None,
    limits: Mapping[str, Any],
    workers: int | None,
    node: str | None,
) -> None:
    """Do the work of :meth:`Queue.tune`, in the repository."""
    services.repository.require("overrides")
    if unknown := limits.keys() - {*LIMITS}:
        raise TypeError(f"tune() has no option {', '.join(sorted(unknown))}")
    _refuse_mixed(type, "tune", workers=workers is not None, node=node)
    if type is not None:
        if not limits:
            raise ConfigurationError(f"tune() requires a limit: one of {', '.join(LIMITS)}")
        name, wanted = check_key(type, "type"), check_limits(limits)
        merged = lambda known: known.with_type(name, {**known.types.get(name, {}), **wanted})  # noqa: E731
        services.controls.override(merged)
        return
    if limits:
        raise ConfigurationError(
            f"{', '.join(limits)} must be of a type: name the type as the first argument"
        )
    number = check_workers(workers)
    if node is not None:
        _refuse_unfit(services, node)
    services.controls.override(lambda known: _cleaned(services, known.with_workers(number, node)))


def untune(
    services: Services,
    type: str | None,
    only: Collection[str] | None,
    workers: bool,
    node: str | None,
) -> None:
    """Do the work of :meth:`Queue.untune`, in the repository."""
    services.repository.require("overrides")
    _refuse_mixed(type, "untune", workers=workers, node=node)
    if type is None and only is not None:
        raise ConfigurationError("only names limits of a type: name the type, too")
    names = {*LIMITS} if only is None else {only} if isinstance(only, str) else {*only}
    if unknown := names - {*LIMITS}:
        raise ConfigurationError(
            f"only must name limits ({', '.join(LIMITS)}), not {', '.join(map(repr, unknown))}"
        )
    if type is None:
        services.controls.override(lambda known: _cleaned(services, known.with_workers(None, node)))
        return
    name = check_key(type, "type")

    def without(known: Overrides) -> Overrides:
        left: Any = {
            option: value
            for option, value in known.types.get(name, {}).items()
            if option not in names
        }
        return known.with_type(name, left)

    services.controls.override(without)


def _refuse_unfit(services: Services, node: str) -> None:
    """Raise an error if the number of workers of a node cannot be set."""
    found = queries.live_node(services.repository, node)
    if found is None:
        raise NodeNotFound(node)
    if engine := found.about.engine:
        raise ConfigurationError(
            f"node {found.name} has no workers of its own: set the number of tasks at a time by the "
            f"options of {engine}'s worker"
        )


def _refuse_mixed(type: str | None, what: str, *, workers: bool, node: str | None) -> None:
    if type is not None and (workers or node is not None):
        raise ConfigurationError(
            f"{what}() changes the limits of a type or the workers of nodes: make two calls"
        )
    if type is None and not workers:
        raise ConfigurationError(f"{what}() requires a type, or workers")
    if node is not None:
        check_key(node, "node")


def _cleaned(services: Services, known: Overrides) -> Overrides:
    """Return overrides without those of nodes that are gone."""
    if not known.nodes:
        return known
    there = {node.id for node in services.repository.nodes()}
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
    for type, entry in list(registry.registered.items()):
        own[type] = entry.options.limit
    return Tuned(
        types={
            type: TunedType(limits=limits, own=options_of_limit(own[type]) if type in own else None)
            for type, limits in sorted(overrides.types.items())
        },
        workers=overrides.workers,
        nodes=overrides.nodes,
    )
