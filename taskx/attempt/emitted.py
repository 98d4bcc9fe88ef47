"""What a run emits, until it is stored."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from taskx.tasks import payload
from taskx.tasks.errors import PayloadError
from taskx.tasks.streams import (
    MAX_CHUNK,
    MAX_PAYLOADS,
    Piece,
    text_of_chunks,
    text_of_piece,
)

# Characters of a note from which on the next chunks are put into another one.
_MOST_IN_NOTE = 256 * 1024


class Emitted:
    """The chunks of a run. Several threads of the run may add some.

    Args:
        max_payload_size: the queue's limit.
    """

    def __init__(self, max_payload_size: int) -> None:
        self._most = MAX_PAYLOADS * max_payload_size
        #: True if there are chunks, and if what earlier runs have emitted was removed.
        self.some = self.alone = False
        self._lock = threading.Lock()
        self._size = self._tail_size = 0
        # The number of the last chunk in a note, and the chunks that follow: changed in one step.
        self._open: tuple[int, list[str]] = 0, []
        # The texts of the notes that are not stored yet, by the numbers of their last chunks.
        self._notes: dict[int, str] = {}

    def add(self, value: Any, start: int) -> None:
        """Add a chunk. Raises ``PayloadError`` if it is not JSON, or there would be too much."""
        text = payload.encode(value, "chunk", payload.NO_LIMIT)
        size = len(text) if text.isascii() else len(text.encode())
        if size > MAX_CHUNK:
            problem = f"{size:,} bytes as JSON, more than a chunk may have ({MAX_CHUNK:,})"
            raise PayloadError("chunk", problem)
        with self._lock:
            self._grow(size)
            if self._tail_size + size > _MOST_IN_NOTE:
                self._freeze()
            before, tail = self._open
            tail.append(text)
            self._tail_size += size
            self._tell_steps(Piece(start, before + len(tail), 1, size))

    def repeat(self, pieces: Sequence[Piece]) -> None:
        """Add chunks of earlier runs: those of a step that this run skips."""
        with self._lock:
            self._freeze()
            for piece in pieces:
                self._grow(piece.size)
                number = self._open[0] + piece.length
                self._notes[number] = text_of_piece(piece)
                self._open = number, []
                self._tell_steps(piece)

    def take_in(self, notes: Mapping[int, str]) -> None:
        """Add notes that a child process has made."""
        with self._lock:
            self.some = True
            self._notes.update(notes)

    def unsaved(self) -> dict[int, str]:
        """Return the texts of the notes that are not stored, by the numbers of their last chunks.

        Storing a note twice does no harm: a number always has the same text.
        """
        if not (self._notes or self._open[1]):
            return {}
        with self._lock:
            self._freeze()
            return self._notes.copy()

    def forgotten(self) -> None:
        """Note that what earlier runs have emitted was removed."""
        self.alone = True

    def saved(self, numbers: Mapping[int, str]) -> None:
        """Note that these notes are stored."""
        for number in numbers:
            self._notes.pop(number, None)

    def _grow(self, size: int) -> None:
        if self._size + size > self._most:
            problem = (
                f"the task has emitted more than {MAX_PAYLOADS} times max_payload_size "
                f"({self._most:,} bytes)"
            )
            raise PayloadError("chunk", problem)
        self._size += size
        self.some = True

    def _freeze(self) -> None:
        before, tail = self._open
        if tail:
            number = before + len(tail)
            self._notes[number] = text_of_chunks(tail)
            self._open = number, []
            self._tail_size = 0

    def _tell_steps(self, piece: Piece) -> None:
        for emitted, pieces in _steps.get():
            if emitted is self:
                last = pieces[-1] if pieces else None
                if last is not None and last.next == (piece.start, piece.first):
                    pieces[-1] = last._replace(
                        length=last.length + piece.length, size=last.size + piece.size
                    )
                else:
                    pieces.append(piece)


#: The steps that this thread or coroutine is in, each as the stream of its run and what it has emitted.
_steps: ContextVar[tuple[tuple[Emitted, list[Piece]], ...]] = ContextVar("steps", default=())


@contextmanager
def in_step(emitted: Emitted) -> Iterator[list[Piece]]:
    """Collect in a list what is emitted inside the block, by this thread or coroutine."""
    pieces: list[Piece] = []
    outside = _steps.set((*_steps.get(), (emitted, pieces)))
    try:
        yield pieces
    finally:
        _steps.reset(outside)
