"""The objects of a kind that are in use."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class InUse(Generic[T]):
    """Weak references to objects. Any thread may add one, or iterate over those that are left.

    A ``WeakSet`` fails if another thread adds a member, or drops the last reference to one, while it is
    iterated over. After an interrupt in its iteration, it would forget no member any more.
    """

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[T]] = {}

    def __iter__(self) -> Iterator[T]:
        known = list(self._known.values())
        return iter([one for ref in known if (one := ref()) is not None])

    def add(self, one: T) -> None:
        """Add an object, until it is in use no more."""
        known, key = self._known, id(one)

        def remove(_: object) -> None:
            known.pop(key, None)

        known[key] = weakref.ref(one, remove)

    def discard(self, one: T) -> None:
        """Remove an object."""
        self._known.pop(id(one), None)
