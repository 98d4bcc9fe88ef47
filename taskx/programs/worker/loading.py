"""Loading a queue by its place in a program: ``module:queue``."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import taskx
from taskx.queue.queue import Queue
from taskx.tasks import permission
from taskx.tasks.errors import ConfigurationError

# The folder of TaskX: its own lines are not those of the user.
_PACKAGE = os.path.join(os.path.dirname(taskx.__file__), "")


def load_queue_to_run(target: str) -> Queue:
    """Return the queue at ``module:name``, as :func:`load_queue`, for a caller that starts it.

    Raises:
        ConfigurationError: as :func:`load_queue`, or the program starts a queue itself; the message has
            the line.
    """
    with permission.loading_queue():
        return load_queue(target)


def load_queue(target: str) -> Queue:
    """Return the queue at ``module:name``. The module is imported from the working folder, too.

    The name may have dots (``app:state.queue``). It is a :class:`Queue`, or a function without arguments
    that returns one.

    Raises:
        ConfigurationError: the module cannot be imported, or there is no queue at this place.
    """
    module, name = check_target(target)
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    return _queue_of(_attribute(_imported(module), name, target), target)


def check_target(target: str) -> tuple[str, str]:
    """Return the module and the name; raise ``ConfigurationError`` if the text has another form."""
    module, _, name = target.partition(":")
    if not (module and name):
        raise ConfigurationError(
            f"{target!r} does not name a queue: write module:name, such as app:queue"
        )
    return module, name


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        # Only if it is this module that is missing, and not one that it imports.
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigurationError(
                f"there is no module {error.name!r} in {os.getcwd()} or on Python's path: change to "
                "its folder, or set PYTHONPATH"
            ) from error
        raise _failed(f"module {name!r} cannot be imported", error) from error
    except BaseException as error:
        raise _failed(f"module {name!r} cannot be imported", error) from error


def _attribute(module: ModuleType, name: str, target: str) -> Any:
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ConfigurationError(
                f"{target!r}: {module.__name__} has no {part!r}{_hint(vars(module), part)}"
            ) from error
    return found


def _hint(names: dict[str, Any], wanted: str) -> str:
    """Return words about the queues of a module, or about names that are spelt like the wanted one."""
    queues = [name for name, value in names.items() if isinstance(value, Queue)]
    if found := queues or difflib.get_close_matches(wanted, names, n=1):
        return f"; did you mean {' or '.join(map(repr, found[:3]))}?"
    return ": give the name of a queue, or of a function that returns one"


def _queue_of(found: Any, target: str) -> Queue:
    made = found
    if not isinstance(found, Queue) and callable(found):
        try:
            made = found()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            called = error.__traceback__ is not None and error.__traceback__.tb_next is not None
            what = "raised an error" if called else "cannot be called without arguments"
            raise _failed(f"{target!r} {what}", error) from error
    if not isinstance(made, Queue):
        what = "it returns" if made is not found else "it is"
        raise ConfigurationError(
            f"{target!r} is not a queue: {what} an object of the type {type(made).__name__}"
        )
    return made


def _failed(what: str, error: BaseException) -> ConfigurationError:
    """Return an error of one line that says what failed, why, and at which line of the user's code."""
    words = " ".join(str(error).split())
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_PACKAGE, "<frozen "))
    ]
    if isinstance(error, permission.StartRefused) and own:
        return ConfigurationError(f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line} — {words}")
    # The text of a SyntaxError names the file and the line.
    known = isinstance(error, SyntaxError) or not own
    place = "" if known else f" ({own[-1].filename}, line {own[-1].lineno})"
    return ConfigurationError(f"{what}: {type(error).__name__}: {words}{place}")


def files_of(error: BaseException | None) -> Iterable[str]:
    """Yield the files that an error of :func:`load_queue` is about: changing one may correct it."""
    while error is not None:
        if isinstance(error, SyntaxError) and error.filename:
            yield error.filename
        yield from (frame.filename for frame in traceback.extract_tb(error.__traceback__))
        error = error.__cause__
