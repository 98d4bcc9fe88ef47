"""A sorted collection in which to put in and to take out costs about the same however many there are."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from itertools import chain
from operator import itemgetter
from typing import Any

#: Items in a block; one with twice as many is split.
BLOCK = 500
_last = itemgetter(-1)


class SortedItems:
    """Different items, in order, in blocks that are short and never empty.

    Every change is one operation on a list, so that an interrupt comes before it or after it; and to make
    one twice is no harm.
    """

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: list[list[Any]] = []

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self._blocks)

    def __reversed__(self) -> Iterator[Any]:
        return chain.from_iterable(map(reversed, reversed(self._blocks)))

    def _block_of(self, item: Any) -> int:
        """Return the number of the first block that ends with this item or a later one."""
        blocks = self._blocks
        if not blocks or item <= blocks[0][-1]:  # most changes are at one of the two ends
            return 0
        if item > blocks[-1][-1]:
            return len(blocks)
        return bisect.bisect_left(blocks, item, key=_last)

    def start_at(self, item: Any) -> Iterator[Any]:
        """The items from this one on, whether it is there or not."""
        blocks, number = self._blocks, self._block_of(item)
        if number == len(blocks):
            return iter(())
        first = blocks[number]
        rest = chain.from_iterable(blocks[n] for n in range(number + 1, len(blocks)))
        return chain(first[bisect.bisect_left(first, item) :], rest)

    def before(self, item: Any) -> Iterator[Any]:
        """The items before this one, whether it is there or not, from the last to the first."""
        blocks, number = self._blocks, self._block_of(item)
        earlier = chain.from_iterable(reversed(blocks[n]) for n in range(number - 1, -1, -1))
        if number == len(blocks):
            return earlier
        last = blocks[number]
        return chain(reversed(last[: bisect.bisect_left(last, item)]), earlier)

    def add(self, item: Any) -> None:
        """Put in an item, if it is not there."""
        blocks = self._blocks
        if not blocks:
            blocks.append([item])
            return
        number = min(self._block_of(item), len(blocks) - 1)
        block = blocks[number]
        place = bisect.bisect_left(block, item)
        if place < len(block) and block[place] == item:
            return
        block.insert(place, item)
        if len(block) > 2 * BLOCK:
            blocks[number : number + 1] = [block[:BLOCK], block[BLOCK:]]

    def discard(self, item: Any) -> None:
        """Take out an item, if it is there."""
        blocks, number = self._blocks, self._block_of(item)
        if number == len(blocks):
            return
        block = blocks[number]
        place = bisect.bisect_left(block, item)
        if block[place] != item:
            return
        if len(block) == 1:
            del blocks[number]
        else:
            del block[place]
