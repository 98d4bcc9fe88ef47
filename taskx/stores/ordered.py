"""A sorted collection in which adding and removing an item stays cheap, however many items there are."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from itertools import chain
from operator import itemgetter
from typing import Any

#: Items in a block. A block with more than twice as many is split.
BLOCK = 500
_last = itemgetter(-1)


class SortedItems:
    """Different items, sorted, in blocks that are short and never empty.

    Every change is one operation on a list, so an interrupt comes either before or after it. Making the
    same change twice does no harm.
    """

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: list[list[Any]] = []

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def __len__(self) -> int:
        return sum(map(len, self._blocks))

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
        """Iterate over the items from this one on. It need not be in the collection."""
        blocks, number = self._blocks, self._block_of(item)
        if number == len(blocks):
            return iter(())
        first = blocks[number]
        rest = chain.from_iterable(blocks[n] for n in range(number + 1, len(blocks)))
        return chain(first[bisect.bisect_left(first, item) :], rest)

    def before(self, item: Any) -> Iterator[Any]:
        """Iterate, from last to first, over the items before this one. It need not be in the collection."""
        blocks, number = self._blocks, self._block_of(item)
        earlier = chain.from_iterable(reversed(blocks[n]) for n in range(number - 1, -1, -1))
        if number == len(blocks):
            return earlier
        last = blocks[number]
        return chain(reversed(last[: bisect.bisect_left(last, item)]), earlier)

    def add(self, item: Any) -> None:
        """Add an item, unless it is already there."""
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
        """Remove an item, if it is there."""
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
