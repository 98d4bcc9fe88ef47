"""A test kit: queues that a test drives, a clock that it moves, deaths, and the contracts of repositories.

``RepositoryContract`` is the contract of the eight methods, ``PrimitivesContract`` that of the primitives
below them. These two need pytest; the rest, and TaskX itself, do not. The tests of applications use this
package; TaskX itself does not.
"""

from taskx.testing.clock import ManualClock
from taskx.testing.eight import RepositoryContract
from taskx.testing.execution import Outcome, run_executor
from taskx.testing.faults import Fault, Faults, InjectedFault, fail_at, kill_at
from taskx.testing.primitives import PrimitivesContract
from taskx.testing.queues import InlineQueue, ManualQueue, inline, manual
from taskx.testing.simulation import BrokenPromise, replay, simulate
from taskx.testing.survives import survives

__all__ = [
    "BrokenPromise",
    "Fault",
    "Faults",
    "InjectedFault",
    "InlineQueue",
    "ManualClock",
    "ManualQueue",
    "Outcome",
    "PrimitivesContract",
    "RepositoryContract",
    "fail_at",
    "inline",
    "kill_at",
    "manual",
    "replay",
    "run_executor",
    "simulate",
    "survives",
]
