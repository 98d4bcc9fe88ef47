"""The place in a stored traceback at which user code failed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import attrs

#: The first line of the frames, also of an exception group and of the stacks that a crash left behind.
_HEADER = re.compile(r"(  \+ )?([A-Z].*)\(most recent call (last|first)\):")
_FRAME = re.compile(r'[ |]+File "(.+)", line (\d+),? in (.+)')
_PACKAGE = re.compile(r".*[/\\](?:site|dist)-packages[/\\][^/\\]+")
_LIBRARY = re.compile(
    r".*[/\\]((?:site|dist)-packages|lib(?:64)?[/\\](?:python|pypy)3\.\d+t?)[/\\]"
)
_OURS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
_STDLIB = os.path.join(os.path.dirname(os.__file__), "")
#: File names of code that was typed in, not generated.
_TYPED = ("<stdin>", "<string>", "<ipython")
#: The line in place of the middle of a long traceback.
_LEFT_OUT = "…"


@attrs.frozen
class Place:
    """A line of code. ``str()`` is ``file:line in function``.

    Attributes:
        file: the path of the file, as the process that ran it knew it.
        line: the number of the line.
        function: the name of the function.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


def place_of(traceback: str) -> Place | None:
    """Return the deepest frame of user code in a traceback.

    User code is all code outside of installed packages, the standard library and TaskX, or else the package
    of the first frame. If there is no such frame, return the deepest one; None if there are no frames. If
    an error was raised because of another one, its own frames count.
    """
    frames = [*_frames(traceback)]
    users = [frame for frame in frames if not _in_library(frame.file)]
    if frames and not users and (package := _PACKAGE.match(frames[0].file)):
        users = [frame for frame in frames if frame.file.startswith(package[0])]
    return next(reversed(users or frames), None)


def _frames(traceback: str) -> Iterator[Place]:
    """Return the frames of the last error in a traceback, the deepest one last."""
    lines = traceback.splitlines()
    titles = [n for n, line in enumerate(lines) if line.endswith("):")]  # a quick check
    headers = [(n, header) for n in titles if (header := _HEADER.match(lines[n]))]
    if not headers:
        return iter(())
    # After a crash, the stack of the thread that crashed is one of several.
    crashed = [header for header in headers if header[1][2].startswith("Current thread")]
    start, header = (crashed or headers)[-1]
    frames = [Place(f[1], int(f[2]), f[3]) for f in _matches(lines[start + 1 :])]
    return iter(frames) if header[3] == "last" else reversed(frames)


def _matches(lines: list[str]) -> Iterator[re.Match[str]]:
    """Yield the frames among the lines that follow a header, up to the text of the error."""
    left_out = False
    for line in lines:
        if frame := _FRAME.match(line):
            yield frame
        # After the gap comes the rest of a line.
        elif line.lstrip(" |").startswith("+-") or not (line[:1] in " …" or left_out):
            return
        left_out = line == _LEFT_OUT


def _in_library(file: str) -> bool:
    if file.startswith("<"):
        return not file.startswith(_TYPED)
    return file.startswith((_OURS, _STDLIB)) or _LIBRARY.match(file) is not None
