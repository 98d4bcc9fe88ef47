"""What helps to test code that uses TaskX: a clock by hand, and the contracts of repositories.

``RepositoryContract`` is that of the eight methods, ``PrimitivesContract`` that of what the runtime builds
on. They need pytest; the rest, and TaskX itself, do not.
"""

from taskx.testing.clock import ManualClock
from taskx.testing.eight import RepositoryContract
from taskx.testing.primitives import PrimitivesContract

__all__ = ["ManualClock", "PrimitivesContract", "RepositoryContract"]
