"""The place in a traceback at which user code failed."""

from __future__ import annotations

import json
import os
import traceback

import pytest

from taskx import Place
from taskx.attempt.failures import MAX_TRACEBACK, shortened, traceback_text
from taskx.insight import places
from taskx.insight.places import place_of


def text_of(call) -> str:
    try:
        call()
    except BaseException as error:  # noqa: BLE001
        return traceback_text(error, skip=0)
    raise AssertionError("it did not raise")


def here(traceback: str) -> str:
    """Return the function of the place, which must be in this file."""
    place = place_of(traceback)
    assert place.file == __file__
    return place.function


def in_file(path: str, line: int, function: str) -> str:
    return f'  File "{path}", line {line}, in {function}\n    some_code()\n'


def trace(*frames: str) -> str:
    return "Traceback (most recent call last):\n" + "".join(frames) + "ValueError: no\n"


USER = in_file("/srv/app/jobs.py", 12, "run")
LIBRARY = in_file("/srv/venv/lib/python3.11/site-packages/requests/api.py", 59, "get")
STDLIB = in_file("/usr/lib/python3.12/json/decoder.py", 340, "decode")


def test_the_place_is_the_deepest_frame_of_the_users_code():
    def parse():
        json.loads("{")

    place = place_of(text_of(lambda: parse()))
    assert (place.file, place.function) == (__file__, "parse")
    assert place.line == parse.__code__.co_firstlineno + 1
    assert str(place) == f"{__file__}:{place.line} in parse"


@pytest.mark.parametrize(
    "deeper",
    [
        LIBRARY,
        STDLIB,
        in_file("/usr/lib64/python3.13/json/decoder.py", 340, "decode"),
        in_file("/opt/pypy/lib/pypy3.11/json/decoder.py", 340, "decode"),
        in_file("/usr/lib/python3/dist-packages/yaml/__init__.py", 1, "load"),
        in_file(r"C:\Python\Lib\site-packages\requests\api.py", 59, "get"),
        in_file("<frozen importlib._bootstrap>", 241, "_call_with_frames_removed"),
        in_file("<attrs generated init jobs.Job>", 3, "__init__"),
        in_file(places.__file__, 1, "place_of"),
        in_file(os.__file__, 1, "fspath"),
    ],
)
def test_code_of_libraries_and_of_python_is_no_place(deeper):
    assert place_of(trace(USER, deeper)) == Place("/srv/app/jobs.py", 12, "run")


@pytest.mark.parametrize("file", ["<stdin>", "<string>", "<ipython-input-3-8a2f>"])
def test_code_that_was_typed_in_is_a_place(file):
    assert place_of(trace(in_file(file, 1, "<module>"), LIBRARY)) == Place(file, 1, "<module>")


def test_an_installed_application_is_user_code_if_there_is_no_other():
    root = "/opt/lib/python3.13/site-packages"
    ours = [in_file(f"{root}/shop/{name}.py", 7, name) for name in ("tasks", "prices")]
    assert place_of(trace(*ours, LIBRARY, STDLIB)).function == "prices"
    assert place_of(trace(STDLIB)).function == "decode"


@pytest.mark.parametrize("text", ["", "<the traceback could not be formatted>", "ValueError: no"])
def test_without_frames_there_is_no_place(text):
    assert place_of(text) is None


def test_of_a_chain_of_errors_the_last_one_counts():
    def inner():
        raise KeyError("inner")

    def outer():
        try:
            inner()
        except KeyError as error:
            raise ValueError("outer") from error

    text = text_of(outer)
    assert "direct cause" in text
    assert here(text) == "outer"


def test_the_text_of_an_error_does_not_look_like_a_frame():
    def fails():
        raise ValueError('in the template:\n  File "page.html", line 3, in body')

    assert here(text_of(fails)) == "fails"


def test_the_middle_of_a_long_traceback_may_be_missing():
    frames = [in_file("/srv/app/jobs.py", n, f"step_{n}") for n in range(2000)]
    cut = shortened(trace(*frames, LIBRARY))
    assert len(cut) <= MAX_TRACEBACK
    assert "\n…\n" in cut
    assert place_of(cut).function == "step_1999"


def test_the_frames_of_an_exception_group_are_its_own():
    lines = [
        "  + Exception Group Traceback (most recent call last):",
        '  |   File "/srv/app/jobs.py", line 8, in run',
        "  |     raise ExceptionGroup('both', errors)",
        "  | ExceptionGroup: both (1 sub-exception)",
        "  +-+---------------- 1 ----------------",
        "    | Traceback (most recent call last):",
        '    |   File "/srv/app/jobs.py", line 3, in first',
        "    |     raise ValueError",
        "    | ValueError",
        "    +------------------------------------",
    ]
    assert place_of("\n".join(lines)) == Place("/srv/app/jobs.py", 8, "run")


def test_after_a_crash_the_stack_of_the_thread_that_crashed_counts():
    words = (
        "Fatal Python error: Segmentation fault\n\n"
        "Thread 0x00007f1 (most recent call first):\n"
        '  File "/srv/app/other.py", line 4 in wait\n\n'
        "Current thread 0x00007f2 (most recent call first):\n"
        '  File "/usr/lib/python3.11/ctypes/__init__.py", line 517 in string_at\n'
        '  File "/srv/app/jobs.py", line 12 in read\n'
        '  File "/srv/app/jobs.py", line 30 in run\n\n'
        "Thread 0x00007f3 (most recent call first):\n"
        '  File "/srv/app/third.py", line 9 in wait\n'
    )
    assert place_of(words) == Place("/srv/app/jobs.py", 12, "read")


def test_the_stack_of_a_stuck_thread_has_a_place():
    stack = traceback.format_list(traceback.extract_stack())
    text = "The thread is here (most recent call last):\n" + "".join(stack)
    assert here(text) == "test_the_stack_of_a_stuck_thread_has_a_place"
