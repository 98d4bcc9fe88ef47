"""The reading of what tasks emit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from taskx.stores.base import Repository
from taskx.tasks.model import Task
from taskx.tasks.streams import (
    Chunk,
    Piece,
    Place,
    content_of,
    last_in,
    note_name,
    place_of,
    stream_of,
)
from taskx.tasks.writes import Note

# Notes that are read at a time: most are small, and a large one has a quarter of a megabyte.
_PAGE = 16


class Reader:
    """Reads what a task has emitted, from a place on.

    Args:
        repository: the repository to read.
        task: the record of the task.
        after: the position of the last chunk that is known; None if none is.
    """

    def __init__(self, repository: Repository, task: Task, after: str | None = None) -> None:
        self._repository = repository
        self._stream = stream_of(task)
        # Where to read on, and the run whose chunks were returned last.
        self._place = Place(task.starts, 0) if after is None else place_of(after)
        self._run = None if after is None else self._place.start

    def read(self) -> Sequence[Chunk]:
        """Return the next chunks; empty if there are no more yet.

        The chunks of a run that another one has followed are left out, if those of the other one are known.
        """
        page = self._notes(self._place)
        if (
            not page and self._run is None
        ):  # the newest run has emitted nothing: see the earlier ones
            page = self._notes(Place(0, 0))
        while page:
            newest = last_in(max(page)).start
            some = {name: note for name, note in page.items() if last_in(name).start == newest}
            if chunks := self._all_chunks(some):
                return chunks
            # Chunks before these were removed, after another run began; or they are just being stored.
            page = self._notes(Place(newest + 1, 0))
        return []

    def _notes(self, after: Place) -> dict[str, Note]:
        name = note_name(self._stream, after)
        return self._repository.reads.notes_after(self._stream, name, _PAGE)

    def _all_chunks(self, page: Mapping[str, Note]) -> list[Chunk]:
        """Return the new chunks in some notes of a run, as far as none is missing before them."""
        chunks: list[Chunk] = []
        for name, note in page.items():
            if not (found := self._chunks(name, note)):
                break
            chunks += found
        return chunks

    def _chunks(self, name: str, note: Note) -> list[Chunk]:
        """Return the chunks in a note that are new; empty if others are missing before them."""
        last, content = last_in(name), content_of(name, note.text, self._repository.codecs)
        count = content.length if isinstance(content, Piece) else len(content)
        known = self._place.number if last.start == self._place.start else 0
        if (skipped := known - (last.number - count)) < 0:
            return []
        if isinstance(content, Piece):
            values = [*self._piece(content, skipped)]
            if len(values) < count - skipped:
                return []
        else:
            values = content[skipped:]
        restart = self._run not in (None, last.start)
        self._place, self._run = last, last.start
        return [
            Chunk(value, str(Place(last.start, known + n)), restart and n == 1)
            for n, value in enumerate(values, 1)
        ]

    def _piece(self, piece: Piece, skipped: int) -> Iterator[object]:
        """Yield chunks of an earlier run, without the first ones."""
        number, end = piece.first - 1 + skipped, piece.first - 1 + piece.length
        while number < end and (page := self._notes(Place(piece.start, number))):
            for name, note in page.items():
                last, values = last_in(name), content_of(name, note.text, self._repository.codecs)
                if last.start != piece.start or isinstance(values, Piece):
                    return
                first = last.number - len(values)
                if first > number:
                    return
                some = values[number - first : end - first]
                yield from some
                number += len(some)
                if number >= end:
                    return
