"""Task ids: UUIDs of version 7, which sort by the time of their creation.

The key of a task is a number of 63 bits that sorts in the same way. From the top it has 43 bits with the
milliseconds since 1970 (until the year 2248), 19 bits with a counter of the process, and one bit that is 0
if the id of the task was made here. Such an id has the key in it; for another id, a key is made.
"""

from __future__ import annotations

import os
import threading
import time
from functools import lru_cache

#: Milliseconds by which the key in an id may be later than the time of its creation: if the clock is set
#: back a little, ids keep their order.
KEPT_ORDER = 1000
_COUNTED = 20  # the bits of a key below its milliseconds
_FULL = (1 << _COUNTED) - 1
_LAST = (1 << 63 - _COUNTED) - 1  # the last moment of a key, in milliseconds

# Reentrant: a finalizer may submit a task while its thread holds the lock.
_lock = threading.RLock()
_moment = -1  # of the latest id
_prefix = _suffix = ""  # what all ids of that moment begin and end with
_counted = 0  # an even number of _COUNTED bits
# The moment of the latest key that was made for an id, and the number of the first key of that moment.
_keyed, _least = -1, 0


def new_id(now: int | None = None) -> str:
    """Return a new UUIDv7 as text; it sorts after the earlier ids of this process.

    The layout is that of RFC 9562, section 5.7, with a counter as in section 6.2, method 1. If the clock is
    set back by a second or more, new ids sort where the clock says.

    Args:
        now: the time, in milliseconds since 1970; None for the time of the system.
    """
    global _counted
    if now is None:
        now = time.time_ns() // 1_000_000
    with _lock:
        counted = _counted = _counted + 2 & _FULL
        if not _moment - KEPT_ORDER < now <= _moment:
            _start(min(max(now, 0), _LAST))
        elif not counted:  # the earlier ids of this moment have higher numbers
            _start(_moment + 1)
        return f"{_prefix}{counted >> 8:03x}-a{counted & 0xFF:02x}{_suffix}"


def _start(moment: int) -> None:
    """Begin the ids of a moment."""
    global _moment, _prefix, _suffix
    tail = os.urandom(7).hex()
    _prefix = f"{moment >> 16:08x}-{moment & 0xFFFF:04x}-7"
    _suffix = f"{tail[0]}-{tail[1:13]}"
    _moment = moment  # last: after an interrupt before this, the moment begins again


# A key is needed about five times, in most cases soon after another.
@lru_cache(maxsize=1000)
def key_of(id: str) -> int | None:
    """Return the key in an id of :func:`new_id`; None if the id has none.

    An id that was made elsewhere may also seem to have one.
    """
    if len(id) != 36 or id[14] != "7":
        return None
    try:
        key = int(id[:8] + id[9:13] + id[15:18] + id[20:22], 16)
    except ValueError:
        return None
    return key if not key & 1 and key >> 63 == 0 else None


def new_key(created_at: int) -> int:
    """Return a key for a task that was created at a time, in milliseconds, and whose id has none.

    It sorts after the earlier ones of that moment.
    """
    global _counted, _keyed, _least
    with _lock:
        counted = _counted = _counted + 2 & _FULL
        if created_at != _keyed:
            _keyed, _least = created_at, counted
        began_anew = counted < _least  # the earlier keys of this moment have higher numbers
    return key_at(created_at + began_anew) | counted | 1


def key_at(moment: int) -> int:
    """Return a number above the keys of all moments before this one, and not above those of later ones."""
    return min(max(moment, 0), _LAST) << _COUNTED


def made_at(id: str) -> int:
    """Return the time at which an id of :func:`new_id` was made, in milliseconds; 0 if it is no such id."""
    try:
        return int(id.replace("-", "")[:12], 16)
    except ValueError:
        return 0


def _renew() -> None:
    """Count from a random number. Otherwise a parent and its child would make the same ids."""
    global _lock, _moment, _keyed, _counted
    _lock, _moment, _keyed = threading.RLock(), -1, -1
    _counted = int.from_bytes(os.urandom(3), "big") & _FULL & ~1


_renew()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
