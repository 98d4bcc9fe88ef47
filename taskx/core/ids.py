"""Task ids: UUID version 7, so that ids sort by the time they were made."""

from __future__ import annotations

import os
import threading
import time

_lock = threading.Lock()
_last = 0
_random_state = 0


def new_id() -> str:
    """A new UUIDv7 as text, later than every one this process made before.

    Layout after RFC 9562, section 5.7; within one millisecond the 74 random bits are counted up
    (its section 6.2, method 2), so that ids made in a tight loop keep their order.
    """
    global _last, _random_state
    with _lock:
        now = time.time_ns() // 1_000_000
        if now > _last:
            _last = now
            # The top bit starts clear: room to count up within the millisecond.
            _random_state = int.from_bytes(os.urandom(10), "big") & ((1 << 73) - 1)
        else:
            _random_state += 1 + (_random_state & 0xFF)
        value = (
            (_last << 80)
            | (0x7 << 76)
            | ((_random_state >> 62) & 0xFFF) << 64
            | (0b10 << 62)
            | (_random_state & ((1 << 62) - 1))
        )
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _renew_after_fork() -> None:
    global _last, _lock
    _lock = threading.Lock()
    _last = 0  # fresh random bits, or parent and child would count up from the same ones


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)
