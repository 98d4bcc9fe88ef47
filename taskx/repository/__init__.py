"""Everything that a repository of your own needs: the classes to inherit, rows, writes, notes and errors.

The names of this module are public. The modules that they come from are not, and may move.
``taskx.repository.example`` is a complete repository that imports nothing else of TaskX. The contracts that
test a repository need pytest. They are imported at their first use.
"""

from typing import TYPE_CHECKING, Any

from taskx.stores.base import (
    BASIC_CONDITIONS,
    Fields,
    Listed,
    Locked,
    Lookup,
    Reads,
    Reentered,
    Repository,
    Rows,
    Timed,
    new_version,
)
from taskx.stores.eight import TaskRepository
from taskx.stores.parts import Forks, House, Listener, News, at_forks
from taskx.tasks.clock import SYSTEM_CLOCK, Clock, SystemClock, to_datetime, to_ms
from taskx.tasks.codec import Codec, Codecs
from taskx.tasks.errors import (
    ConfigurationError,
    DuplicateTask,
    InvalidTransition,
    PayloadError,
    RepositoryCorrupt,
    RepositoryError,
    RepositoryUnavailable,
    SchemaMismatch,
    TaskNotFound,
)
from taskx.tasks.model import CONDITIONS, TASK_FIELDS, Task, TaskFilter, TaskStatus
from taskx.tasks.record import (
    BY_THREAD,
    COLUMNS,
    DEFAULTS,
    FOR_PARENTS,
    FOR_TURN,
    FREE,
    UNIQUE,
    UNTIL_DUE,
    Ended,
    Stub,
    parents_from_text,
    stub_from_row,
    task_from_row,
)
from taskx.tasks.writes import PRESENT, Delete, Insert, Note, NoteChange, Update, Write, matches

if TYPE_CHECKING:
    from taskx.testing import PrimitivesContract, RepositoryContract

__all__ = [
    "BASIC_CONDITIONS",
    "BY_THREAD",
    "COLUMNS",
    "CONDITIONS",
    "DEFAULTS",
    "FOR_PARENTS",
    "FOR_TURN",
    "FREE",
    "PRESENT",
    "SYSTEM_CLOCK",
    "TASK_FIELDS",
    "UNIQUE",
    "UNTIL_DUE",
    "Clock",
    "Codec",
    "Codecs",
    "ConfigurationError",
    "Delete",
    "DuplicateTask",
    "Ended",
    "Fields",
    "Forks",
    "House",
    "Insert",
    "InvalidTransition",
    "Listed",
    "Listener",
    "Locked",
    "Lookup",
    "News",
    "Note",
    "NoteChange",
    "PayloadError",
    "PrimitivesContract",
    "Reads",
    "Reentered",
    "Repository",
    "RepositoryContract",
    "RepositoryCorrupt",
    "RepositoryError",
    "RepositoryUnavailable",
    "Rows",
    "SchemaMismatch",
    "Stub",
    "SystemClock",
    "Task",
    "TaskFilter",
    "TaskNotFound",
    "TaskRepository",
    "TaskStatus",
    "Timed",
    "Update",
    "Write",
    "at_forks",
    "matches",
    "new_version",
    "parents_from_text",
    "stub_from_row",
    "task_from_row",
    "to_datetime",
    "to_ms",
]


def __getattr__(name: str) -> Any:
    """Import the contracts when they are first used."""
    if name not in ("PrimitivesContract", "RepositoryContract"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from taskx import testing

    return getattr(testing, name)
