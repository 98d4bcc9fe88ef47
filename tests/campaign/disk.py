"""What a power cut may leave of the files of a folder, by a record of what programs wrote and synced.

``strace`` makes the record. The model is one of the worst disks that POSIX allows. What is not synced may
be lost or kept, each write for itself and in any order, also in part. The entry of a file in its folder, or
its removal, is a write of the folder: it may be lost until the *folder* is synced. A sector of 512 bytes is
written whole or not at all, and bytes beside a write are never touched, on which SQLite relies as well.

What is written through mapped memory is not seen. TaskX and SQLite keep nothing there that must survive.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

import attrs

_CALLS = (
    "open", "openat", "creat", "write", "pwrite64", "writev", "pwritev", "pwritev2", "fsync",
    "fdatasync", "ftruncate", "truncate", "fallocate", "copy_file_range", "sendfile", "unlink",
    "unlinkat", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "link", "linkat",
)  # fmt: skip
_LINE = re.compile(r"(\d+) +(.*)")
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>")
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)(?:<([^>]*)>)?")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_FD = re.compile(r"-?\w+<((?:\\x[0-9a-f]{2})*)>")
SECTOR = 512
#: What a disk may write of its own accord: a write is lost or kept in pieces of so many bytes.
_PIECE = 4096

#: What a power cut does to a piece of a write, or to an entry of a folder, that is not synced.
Fate = Literal["lost", "kept", "torn"]


def record(command: Sequence[str | Path], trace: Path, env: dict[str, str]) -> None:
    """Run a program to its end, with the programs that it starts, and record what they write."""
    strace = ("strace", "-f", "-qq", "-y", "-xx", "-s", "10000000", "--seccomp-bpf")
    select = ("-e", f"trace={','.join(_CALLS)}", "-e", "signal=none", "-o", trace)
    done = subprocess.run([*strace, *select, *command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


class Event(NamedTuple):
    """Something that happened to the files.

    Attributes:
        what: "write", "cut" (to a length), "add" (a file to a folder), "make" (a folder), "remove", "sync"
            (it begins), "synced" (it has ended), or "told" (the program has told somebody something).
        path: of the file or the folder.
        name: of the entry.
        offset: of the bytes; the new length of a file.
        number: tells which sync has ended.
    """

    what: str
    path: str
    name: str = ""
    data: bytes = b""
    offset: int = 0
    number: int = 0


def read(trace: Path, root: Path, told: Path) -> list[Event]:
    """Return what happened in a folder. What is written to the file ``told`` are events of their own.

    A write counts from the end of its call, and a sync covers the writes that had ended before it began: so
    threads and processes may write at the same time. A telling counts from its begin.
    """
    return [*_Reader(str(root), str(told)).events(trace)]


class _Reader:
    def __init__(self, root: str, told: str) -> None:
        self._root, self._told = root, told
        self._begun: dict[str, str] = {}  # for each thread the first part of the line of its call
        self._there = {root}
        self._ends: dict[str, int] = {}  # of files without an offset in their calls
        self._number = 0
        self._syncs: dict[str, int] = {}

    def events(self, trace: Path) -> Iterator[Event]:
        with trace.open() as lines:
            for line in lines:
                found = _LINE.match(line)
                assert found, line
                thread, rest = found.groups()
                if (unfinished := rest.removesuffix(" <unfinished ...>")) != rest:
                    self._begun[thread] = unfinished
                    yield from self._begin(thread, unfinished)
                elif resumed := _RESUMED.match(rest):
                    yield from self._end(thread, self._begun.pop(thread) + rest[resumed.end() :])
                else:
                    yield from self._begin(thread, rest)
                    yield from self._end(thread, rest)

    def _begin(self, thread: str, text: str) -> Iterator[Event]:
        name, _, rest = text.partition("(")
        if name in ("fsync", "fdatasync"):
            path = _decoded(_FD.match(rest))
            if self._is_inside(path):
                self._number += 1
                self._syncs[thread] = self._number
                yield Event("sync", path, number=self._number)
        elif name == "write" and _decoded(_FD.match(rest)) == self._told:
            yield Event("told", self._told, data=_bytes(_TEXT.search(rest)))

    def _end(self, thread: str, text: str) -> Iterator[Event]:
        found = _CALL.match(text)
        if found is None or found[3].startswith("-"):  # it ended with the process, or failed
            return
        name, rest, result, made = found.groups()
        fd, texts = _decoded(_FD.match(rest)), [_bytes(text) for text in _TEXT.finditer(rest)]
        paths = [os.fsdecode(text) for text in texts]
        if name in ("open", "openat", "creat"):
            yield from self._open(bytes.fromhex(made.replace("\\x", "")).decode(), rest)
        elif name in ("mkdir", "mkdirat"):
            yield from self._add(paths[-1], "make")
        elif name in ("unlink", "unlinkat") and paths[-1] in self._there:
            self._there.discard(paths[-1])
            folder, _, entry = paths[-1].rpartition("/")
            yield Event("remove", folder, entry)
        elif self._is_inside(fd) and name == "ftruncate":
            yield Event("cut", fd, offset=int(rest.rpartition(", ")[2]))
        elif self._is_inside(fd) and name == "pwrite64":
            offset = int(rest.rpartition(", ")[2])
            yield Event("write", fd, data=texts[-1][: int(result)], offset=offset)
        elif self._is_inside(fd) and name == "write":
            data, offset = texts[-1][: int(result)], self._ends.get(fd, 0)
            self._ends[fd] = offset + len(data)
            yield Event("write", fd, data=data, offset=offset)
        elif name in ("fsync", "fdatasync"):
            if (number := self._syncs.pop(thread, 0)) != 0:
                yield Event("synced", fd, number=number)
        elif self._is_inside(fd) or any(map(self._is_inside, paths)):
            raise AssertionError(f"the model does not know this call: {text:.200}")

    def _open(self, path: str, flags: str) -> Iterator[Event]:
        if "O_CREAT" in flags:
            yield from self._add(path)
        if "O_TRUNC" in flags and self._is_inside(path):
            yield Event("cut", path)
        if "O_RDONLY" not in flags:
            self._ends.pop(path, None)

    def _add(self, path: str, what: str = "add") -> Iterator[Event]:
        if self._is_inside(path) and path not in self._there:
            self._there.add(path)
            folder, _, entry = path.rpartition("/")
            yield Event(what, folder, entry)

    def _is_inside(self, path: str) -> bool:
        inside = path == self._root or path.startswith(f"{self._root}/")
        # The index of the log is made anew after a boot. A named pipe has no content.
        return inside and not path.endswith(("-shm", ".pipe", ".new", " (deleted)"))


def _bytes(found: re.Match[str] | None) -> bytes:
    return b"" if found is None else bytes.fromhex(found[1].replace("\\x", ""))


def _decoded(found: re.Match[str] | None) -> str:
    return os.fsdecode(_bytes(found))


@attrs.define
class _File:
    """A file: what is surely on the disk, and the events that may be lost."""

    safe: bytearray = attrs.field(factory=bytearray)
    loose: list[Event] = attrs.field(factory=list)


@attrs.define
class _Folder:
    safe: dict[str, _File | _Folder] = attrs.field(factory=dict)
    #: Entries that were added (with what they lead to) or removed (None), and may be lost.
    loose: list[tuple[str, _File | _Folder | None]] = attrs.field(factory=list)


class Disk:
    """The files of a folder at a moment, with what is not synced."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._now: dict[str, _File | _Folder] = {root: _Folder()}
        self._covered: dict[int, tuple[_File | _Folder, int]] = {}

    def hear(self, event: Event) -> None:
        """Take account of an event."""
        if event.what in ("add", "make"):
            made = _File() if event.what == "add" else _Folder()
            self._now[f"{event.path}/{event.name}"] = made
            self._folder(event.path).loose.append((event.name, made))
        elif event.what == "remove":
            self._now.pop(f"{event.path}/{event.name}", None)
            self._folder(event.path).loose.append((event.name, None))
        elif event.what == "sync":
            node = self._now[event.path]
            self._covered[event.number] = node, len(node.loose)
        elif event.what == "synced":
            self._sync(*self._covered.pop(event.number))
        elif event.what in ("write", "cut"):
            node = self._now[event.path]
            assert isinstance(node, _File)
            node.loose.append(event)

    def _folder(self, path: str) -> _Folder:
        node = self._now[path]
        assert isinstance(node, _Folder)
        return node

    def _sync(self, node: _File | _Folder, covered: int) -> None:
        """Make what was covered safe. Another sync may have done so for the first of it."""
        if isinstance(node, _Folder):
            for name, leads_to in node.loose[:covered]:
                _enter(node.safe, name, leads_to)
        else:
            for event in node.loose[:covered]:
                _put(node.safe, event)
        del node.loose[:covered]
        self._covered = {
            number: (other, max(0, count - covered) if other is node else count)
            for number, (other, count) in self._covered.items()
        }

    def units(self) -> list[bool]:
        """Return for each thing that can be lost alone if it can be torn.

        It is a piece of a write, or a change of a length or of a folder.
        """
        found = []
        for node in self._nodes():
            for change in node.loose:
                if isinstance(change, Event) and change.what == "write":
                    found += [len(_pieces(piece, SECTOR)) > 1 for piece in _pieces(change)]
                else:
                    found.append(False)
        return found

    def leave(self, fates: Sequence[Fate], rng: Random) -> dict[str, bytes | None]:
        """Return the files that a power cut leaves, by path; None for a folder.

        Args:
            fates: what becomes of each of the units.
            rng: chooses the sectors of a torn piece.
        """
        left: dict[str, bytes | None] = {}
        fate = iter(fates)
        contents: dict[int, bytes] = {}
        entries: dict[int, dict[str, _File | _Folder]] = {}
        for node in self._nodes():
            if isinstance(node, _Folder):
                entries[id(node)] = {**node.safe}
                for name, leads_to in node.loose:
                    if next(fate) == "kept":
                        _enter(entries[id(node)], name, leads_to)
                continue
            content = bytearray(node.safe)
            for event in node.loose:
                if event.what == "cut":
                    if next(fate) == "kept":
                        _put(content, event)
                    continue
                for piece in _pieces(event):
                    for part in _survivors(piece, next(fate), rng):
                        _put(content, part)
            contents[id(node)] = bytes(content)
        root = self._now[self._root]
        todo: list[tuple[str, _File | _Folder]] = [("", root)]
        while todo:
            path, node = todo.pop()
            if isinstance(node, _Folder):
                left[path] = None
                todo += [(f"{path}/{name}", child) for name, child in entries[id(node)].items()]
            else:
                left[path] = contents[id(node)]
        del left[""]
        return left

    def _nodes(self) -> list[_File | _Folder]:
        """Return all files and folders that may be found again, each once, in the same order."""
        found: dict[int, _File | _Folder] = {}
        todo: list[_File | _Folder | None] = [self._now[self._root]]
        while todo:
            node = todo.pop()
            if node is None or id(node) in found:
                continue
            found[id(node)] = node
            if isinstance(node, _Folder):
                todo += [*node.safe.values(), *(child for _, child in node.loose)]
        return [*found.values()]


def _enter(
    entries: dict[str, _File | _Folder], name: str, leads_to: _File | _Folder | None
) -> None:
    if leads_to is None:
        entries.pop(name, None)
    else:
        entries[name] = leads_to


def _put(content: bytearray, event: Event) -> None:
    if event.what == "cut":
        del content[event.offset :]
    end = event.offset + len(event.data)
    if len(content) < end:
        content += bytes(end - len(content))
    content[event.offset : end] = event.data


def _pieces(event: Event, size: int = _PIECE) -> list[Event]:
    """Return the parts of a write that lie in different pieces of the file."""
    parts, offset, data = [], event.offset, event.data
    while data:
        room = size - offset % size
        parts.append(event._replace(offset=offset, data=data[:room]))
        offset, data = offset + room, data[room:]
    return parts


def _survivors(piece: Event, fate: Fate, rng: Random) -> list[Event]:
    if fate != "torn":
        return [piece] if fate == "kept" else []
    sectors = _pieces(piece, SECTOR)
    some = rng.choice((1, rng.randint(1, max(1, len(sectors) - 1))))
    if rng.random() < 0.5:  # in order up to a point, or any of them
        return sectors[:some]
    return rng.sample(sectors, some)


def write(left: dict[str, bytes | None], folder: Path) -> None:
    """Make the files that a power cut has left in an empty folder."""
    for path, content in sorted(left.items()):
        place = folder / path.lstrip("/")
        if content is None:
            place.mkdir(parents=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
