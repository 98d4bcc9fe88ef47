"""Task ids: UUIDs of version 7, which sort by the time of their creation."""

from __future__ import annotations

import os
import threading
import time

# Reentrant: a finalizer may submit a task while its thread holds the lock.
_lock = threading.RLock()
_last = 0
_prefix = ""  # the beginning of all ids of that millisecond
_state = 0
_LOW_48 = (1 << 48) - 1


def new_id() -> str:
    """Return a new UUIDv7 as text; it sorts after all earlier ids of this process.

    The layout is that of RFC 9562, section 5.7. Within one millisecond the 74 random bits are counted up
    (section 6.2, method 2), so that ids made in a tight loop keep their order.
    """
    global _last, _prefix, _state
    with _lock:
        now = time.time_ns() // 1_000_000
        if now > _last:
            _last = now
            _prefix = f"{now >> 16:08x}-{now & 0xFFFF:04x}-7"
            # The top bit starts at 0: this leaves room to count up within the millisecond.
            _state = int.from_bytes(os.urandom(10), "big") & ((1 << 73) - 1)
        else:
            _state += 1 + (_state & 0xFF)
        prefix, state = _prefix, _state
    # 12 random bits; two bits for the variant and 14 random ones; 48 random bits.
    variant = 0x8000 | (state >> 48 & 0x3FFF)
    return f"{prefix}{state >> 62 & 0xFFF:03x}-{variant:04x}-{state & _LOW_48:012x}"


def _renew_after_fork() -> None:
    global _last, _lock
    _lock = threading.RLock()
    _last = 0  # forces new random bits: otherwise parent and child would make the same ids


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)
