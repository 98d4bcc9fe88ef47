"""Task ids: UUID version 7, so that ids sort by the time they were made."""

from __future__ import annotations

import os
import threading
import time

_lock = threading.RLock()  # a finalizer that submits may run in the middle of it
_last = 0
_prefix = ""  # the text of what the ids of that millisecond begin with
_state = 0
_LOW_48 = (1 << 48) - 1


def new_id() -> str:
    """A new UUIDv7 as text, later than every one this process made before.

    Layout after RFC 9562, section 5.7; within one millisecond the 74 random bits are counted up
    (its section 6.2, method 2), so that ids made in a tight loop keep their order.
    """
    global _last, _prefix, _state
    with _lock:
        now = time.time_ns() // 1_000_000
        if now > _last:
            _last = now
            _prefix = f"{now >> 16:08x}-{now & 0xFFFF:04x}-7"
            # The top bit starts clear: room to count up within the millisecond.
            _state = int.from_bytes(os.urandom(10), "big") & ((1 << 73) - 1)
        else:
            _state += 1 + (_state & 0xFF)
        prefix, state = _prefix, _state
    # 12 random bits, the variant's two and 14 more, and 48.
    variant = 0x8000 | (state >> 48 & 0x3FFF)
    return f"{prefix}{state >> 62 & 0xFFF:03x}-{variant:04x}-{state & _LOW_48:012x}"


def _renew_after_fork() -> None:
    global _last, _lock
    _lock = threading.RLock()
    _last = 0  # fresh random bits, or parent and child would count up from the same ones


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)
