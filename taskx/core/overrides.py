"""Overrides: limits and numbers of workers that people set while queues run.

The limits of a type are kept in the form in which ``Queue.tune`` takes them: a mapping that has only the
options that are overridden.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import attrs

from taskx.core.checks import check_int, in_seconds
from taskx.core.errors import ConfigurationError
from taskx.core.options import LimitOptions, Options
from taskx.core.rate import Limit, rate_as_given, rate_of

#: The options of a type that can be overridden.
LIMITS = ("max_concurrency", "rate", "burst", "limit_scope")
#: Most workers of a node.
MOST_WORKERS = 10_000


@attrs.frozen
class Overrides:
    """All overrides of a repository. It is false if there are none.

    Attributes:
        types: the overridden limits of each type.
        workers: the number of workers of each node; None: the number that its program configured.
        nodes: the number of workers of single nodes, by their ids.
    """

    types: Mapping[str, LimitOptions] = attrs.field(factory=dict, hash=False)
    workers: int | None = None
    nodes: Mapping[str, int] = attrs.field(factory=dict, hash=False)

    def __bool__(self) -> bool:
        return bool(self.types or self.nodes) or self.workers is not None

    def workers_of(self, node: str, configured: int) -> int:
        """Return the number of workers that a node shall have."""
        return self.nodes.get(node, configured if self.workers is None else self.workers)

    def with_type(self, type: str, limits: LimitOptions) -> Overrides:
        """Return these overrides with other limits of a type; none if ``limits`` is empty."""
        types = {**self.types, type: limits}
        return attrs.evolve(self, types={name: some for name, some in types.items() if some})

    def with_workers(self, workers: int | None, node: str | None = None) -> Overrides:
        """Return these overrides with another number of workers, of all nodes or of one."""
        if node is None:
            return attrs.evolve(self, workers=workers)
        nodes = {name: number for name, number in self.nodes.items() if name != node}
        return attrs.evolve(self, nodes=nodes if workers is None else {**nodes, node: workers})

    def to_text(self) -> str:
        """Return them as JSON text."""
        return json.dumps(attrs.asdict(self))


def from_text(text: str) -> Overrides:
    """Return the overrides of a note; leave out what is damaged, or of a newer version."""
    try:
        known = json.loads(text)
        types = {type: _known_limits(limits) for type, limits in known["types"].items()}
        workers = known["workers"]
        return Overrides(
            {type: limits for type, limits in types.items() if limits},
            None if workers is None else check_workers(workers),
            {node: check_workers(number) for node, number in known["nodes"].items()},
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return Overrides()


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
    if isinstance(rate := checked.get("rate"), (tuple, list)):
        count, period = rate
        seconds = in_seconds(period) if isinstance(period, timedelta) else float(period)
        checked["rate"] = (count, seconds)
    return checked  # type: ignore[no-any-return]


def _known_limits(limits: Any) -> LimitOptions:
    if isinstance(rate := limits.get("rate"), list):
        limits = {**limits, "rate": tuple(rate)}
    try:
        return check_limits(limits)
    except ConfigurationError:
        return {}


def overridden(own: Options, limits: LimitOptions) -> Limit | None:
    """Return the limits of an executor with these options, of which ``limits`` are overridden.

    Raises:
        ConfigurationError: the executor's own limits do not fit together.
    """
    if (given := own.limit) is not None and not limits:
        return given
    wanted: dict[str, Any] = {name: getattr(own, name) for name in LIMITS}
    wanted.update(limits)
    most, rate = wanted["max_concurrency"], wanted["rate"]
    if most is None and rate is None:
        return None
    burst = None if rate is None else wanted["burst"]
    return Limit(most, rate_of(rate, burst), wanted["limit_scope"] or "node")


def options_of_limit(limit: Limit | None) -> LimitOptions:
    """Return limits as the options that set them; empty for no limits."""
    if limit is None:
        return {}
    options: LimitOptions = {}
    if limit.max_concurrency is not None:
        options["max_concurrency"] = limit.max_concurrency
    if limit.rate is not None:
        options["rate"] = rate_as_given(limit.rate)
        options["burst"] = limit.rate.burst
    options["limit_scope"] = limit.scope
    return options
