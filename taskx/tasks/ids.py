"""Task ids: UUIDs of version 7, which sort by the time of their creation.

The key of a task is a number of 63 bits that sorts in the same way. From the top it has 43 bits with the
milliseconds since 1970 (until the year 2248), 19 bits with a counter of the process, and one bit that is 0
if the id of the task was made here. Such an id has the key in it; for another id, a key is made.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

#: Milliseconds by which the key in an id may be later than the time of its creation: if the clock is set
#: back a little, ids keep their order.
KEPT_ORDER = 1000
_COUNTED = 20  # the bits of a key below its milliseconds
_FULL = (1 << _COUNTED) - 1
_MOST_KEYS = 1000  # that are kept in memory
_LAST = (1 << 63 - _COUNTED) - 1  # the last moment of a key, in milliseconds

# Reentrant: a finalizer may submit a task while its thread holds the lock.
_lock = threading.RLock()
# The moment of the latest id, the first key of that moment, and what its ids begin and end with. They are
# set in one step: an interrupt may come between two.
_latest = _NEVER = -1, 0, "", ""
_counted = 0  # an even number of _COUNTED bits
# The moment of the latest key that was made for an id, and the number of the first key of that moment.
_keyed, _least = -1, 0


def new_id(now: int | None = None) -> str:
    """Return a new UUIDv7 as text: see :func:`keyed_id`. ``now`` is the time of the system by default."""
    return keyed_id(time.time_ns() // 1_000_000 if now is None else now)[0]


def keyed_id(now: int) -> tuple[str, int]:
    """Return a new UUIDv7 as text, and the key in it. It sorts after the earlier ids of this process.

    The layout is that of RFC 9562, section 5.7, with a counter as in section 6.2, method 1. If the clock is
    set back by a second or more, new ids sort where the clock says.

    Args:
        now: the time, in milliseconds since 1970.
    """
    global _counted
    with _lock:
        moment, first, start, end = _latest
        counted = _counted = _counted + 2 & _FULL
        if not moment - KEPT_ORDER < now <= moment:
            first, start, end = _begin(min(max(now, 0), _LAST))
        elif not counted:  # the earlier ids of this moment have higher numbers
            first, start, end = _begin(moment + 1)
        text, key = f"{start}{counted >> 8:03x}-a{counted & 0xFF:02x}{end}", first | counted
        if len(_keys) >= _MOST_KEYS:
            _keys.clear()
        _keys[text] = key
        return text, key


def _begin(moment: int) -> tuple[int, str, str]:
    """Begin the ids of a moment."""
    global _latest
    tail = os.urandom(7).hex()
    begun = (
        moment << _COUNTED,
        f"{moment >> 16:08x}-{moment & 0xFFFF:04x}-7",
        f"{tail[0]}-{tail[1:13]}",
    )
    _latest = moment, *begun
    return begun


class _Keys(dict[str, int | None]):
    """The keys in some ids. A key is needed about five times, in most cases soon after another."""

    def __missing__(self, id: str) -> int | None:
        if len(self) >= _MOST_KEYS:
            self.clear()
        key = self[id] = _read_key(id)
        return key


def _read_key(id: str) -> int | None:
    if len(id) != 36 or id[14] != "7":
        return None
    try:
        key = int(id[:8] + id[9:13] + id[15:18] + id[20:22], 16)
    except ValueError:
        return None
    return key if not key & 1 and key >> 63 == 0 else None


_keys = _Keys()
#: Returns the key in an id of :func:`new_id`; None if the id has none. An id that was made elsewhere may
#: also seem to have one.
key_of: Callable[[str], int | None] = _keys.__getitem__


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
    global _lock, _latest, _keyed, _counted
    _lock, _latest, _keyed = threading.RLock(), _NEVER, -1
    _counted = int.from_bytes(os.urandom(3), "big") & _FULL & ~1


_renew()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
