"""What the parts of a queue share."""

from __future__ import annotations

from typing import NamedTuple

from taskx.common.agenda import Agenda
from taskx.common.hooks import Hooks
from taskx.common.ledger import Ledger
from taskx.common.pauses import Pauses
from taskx.common.watcher import Watcher
from taskx.core.clock import Clock
from taskx.core.log import GuardedLogger
from taskx.executing.alarms import Alarms
from taskx.executing.checkpoints import Keeper
from taskx.executing.registry import Registry
from taskx.executing.runner import Runner
from taskx.moving.consequences import Consequences
from taskx.ordering.dependents import Dependents
from taskx.ordering.turns import Turns
from taskx.storage.base import Repository


class Services(NamedTuple):
    """What the parts of a queue share."""

    repository: Repository
    registry: Registry
    ledger: Ledger
    watcher: Watcher
    clock: Clock
    log: GuardedLogger
    alarms: Alarms
    runner: Runner
    hooks: Hooks
    keeper: Keeper
    pauses: Pauses
    agenda: Agenda
    turns: Turns
    dependents: Dependents
    consequences: Consequences
