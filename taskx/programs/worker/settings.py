"""The settings of a supervisor and of its processes."""

from __future__ import annotations

from typing import Any

import attrs
from attrs.validators import optional

from taskx.programs.worker.loading import check_target
from taskx.tasks.checks import by, check_int, check_number

#: The exit code of a process that asks to be replaced.
RECYCLE = 75
#: The exit code for a queue that cannot be loaded, and for settings that are not valid.
USAGE = 2
#: The exit code for a repository that cannot be used.
AWAY = 5
#: Most processes of a supervisor.
MOST = 1000


@attrs.frozen(kw_only=True)
class Settings:
    """The settings of ``taskx worker``.

    Attributes:
        target: the queue, as ``module:name``.
        processes: the number of processes.
        threads: the worker threads of each process; None: the queue's own number.
        stop_timeout: seconds that running tasks have to end, as in ``Queue.stop``.
        max_tasks: attempts after which a process is replaced.
        max_memory: bytes of resident memory from which on a process is replaced.
        max_age: seconds after which a process is replaced.
        health_file: a file that exists, and is written every few seconds, while all is well.
        health_port: a port for HTTP requests about the health; 0 chooses a free one.
        health_host: the address of that port.
        reload: replace a process when a file of an imported module changes.
        log_level: the level of the log, if the program does not set up logging itself.

    Raises:
        ConfigurationError: a value is not valid.
    """

    target: str = attrs.field(validator=lambda _, __, target: check_target(target))
    processes: int = attrs.field(default=1, validator=by(check_int, 1, MOST))
    threads: int | None = attrs.field(default=None, validator=optional(by(check_int, 1, 10_000)))
    stop_timeout: float = attrs.field(default=30.0, validator=by(check_number, 0))
    max_tasks: int | None = attrs.field(default=None, validator=optional(by(check_int, 1, 1 << 62)))
    max_memory: int | None = attrs.field(
        default=None, validator=optional(by(check_int, 1 << 20, 1 << 62))
    )
    max_age: float | None = attrs.field(default=None, validator=optional(by(check_number, 1)))
    health_file: str | None = None
    health_port: int | None = attrs.field(default=None, validator=optional(by(check_int, 0, 65535)))
    health_host: str = "127.0.0.1"
    reload: bool = False
    log_level: str = "INFO"

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return attrs.asdict(self)
