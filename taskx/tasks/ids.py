"""Task ids: UUIDs of version 7, which sort by the time of their creation."""

from __future__ import annotations

import os
import threading
import time

# Reentrant: a finalizer may submit a task while its thread holds the lock.
_lock = threading.RLock()
_last = 0
_prefix = ""  # all ids of that millisecond begin with it
_low = 0  # the last 48 bits of the latest id
_LOW_47 = (1 << 47) - 1


def new_id() -> str:
    """Return a new UUIDv7 as text; it sorts after all earlier ids of this process.

    The layout is that of RFC 9562, section 5.7. Within one millisecond the 74 random bits are counted up
    (section 6.2, method 2), so that ids made in a tight loop keep their order.
    """
    global _last, _prefix, _low
    with _lock:
        now = time.time_ns() // 1_000_000
        if now > _last:
            _last = now
            bits = int.from_bytes(os.urandom(10), "big")
            # 12 random bits; two bits for the variant and 14 random ones; then 48 random bits. The top one
            # of these starts at 0: this leaves room to count up within the millisecond.
            variant = 0x8000 | (bits >> 48 & 0x3FFF)
            _prefix = f"{now >> 16:08x}-{now & 0xFFFF:04x}-7{bits >> 62 & 0xFFF:03x}-{variant:04x}-"
            _low = bits & _LOW_47
        else:
            _low += 1 + (_low & 0xFF)
        return f"{_prefix}{_low:012x}"


def made_at(id: str) -> int:
    """Return the time at which an id of :func:`new_id` was made, in milliseconds; 0 if it is no such id."""
    try:
        return int(id.replace("-", "")[:12], 16)
    except ValueError:
        return 0


def _renew_after_fork() -> None:
    global _last, _lock
    _lock = threading.RLock()
    _last = 0  # forces new random bits: otherwise parent and child would make the same ids


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)
