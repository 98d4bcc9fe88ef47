"""The words of the dashboard in both languages, and values as people read them."""

from __future__ import annotations

import ast
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from string import Formatter

import pytest

import taskx.programs.dashboard
from taskx import every
from taskx.programs.dashboard import words
from taskx.programs.dashboard.chinese import CHINESE
from taskx.programs.dashboard.display import Display

FOLDER = Path(taskx.programs.dashboard.__file__).parent
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=timezone.utc)

# The places of the texts in the arguments of functions.
TEXTS = {"say": [0], "_say": [0], "_": [0], "_with_button": [3], "add": [3]}

# A text in a template: _("…"). No text has a double quote.
IN_TEMPLATE = re.compile(r"""\b_\(\s*(?:"([^"]*)"|'([^']*)')""")


def texts_in_templates():
    for path in sorted(FOLDER.glob("templates/*.html")):
        for found in IN_TEMPLATE.finditer(path.read_text()):
            yield found[1] or found[2], path.name


def texts_in_python():
    """Yield each literal that is passed to ``say`` or ``_``, is a label, or stands in a table of texts."""
    for path in sorted(FOLDER.glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                # A text, or the label of a link or button, is one of the first arguments.
                wanted = [node.args[at] for at in TEXTS.get(name, ()) if at < len(node.args)]
                wanted += [k.value for k in node.keywords if k.arg == "label"]
                for value in wanted:
                    for part in ast.walk(value):
                        if isinstance(part, ast.Constant) and isinstance(part.value, str):
                            yield part.value, path.name


def texts_in_tables():
    """Yield the texts that are chosen while the dashboard runs."""
    from taskx.insight.query import FIELDS
    from taskx.programs.dashboard import charts, display, findings
    from taskx.programs.dashboard.screens import answers, failures, overview, task, tasks, types

    yield from ((text, "display") for text in (*display._DAYS, *(u[1] for u in display._UNITS)))
    yield from ((text, "findings") for text in findings.TEXTS.values())
    yield from ((text, "findings") for text in findings.LABELS.values())
    yield from ((status, "charts") for status in charts.STATUSES)
    yield from ((state, "task") for state in task.STATES)
    yield from ((text, "answers") for _, text in answers.KINDS)
    yield from ((text, "types") for text in types._LIMITS.values())
    yield from ((text, "failures") for _, text, _ in failures.PERIODS)
    yield from ((text, "overview") for _, text, *_ in overview.PERIODS)
    yield from ((text, "tasks") for _, text in tasks.RANGES)
    yield from ((meaning, "tasks") for meaning in FIELDS.values())
    yield from ((label, "tasks") for _, label, _ in tasks.BUTTONS)
    yield from (
        (text, "tasks") for change in tasks.CHANGES for text in (change.question, change.done)
    )


USED = {**dict(texts_in_templates()), **dict(texts_in_python()), **dict(texts_in_tables())}


def fields(text):
    """Return the names in braces."""
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


def test_each_text_has_a_chinese_form():
    missing = {text: file for text, file in USED.items() if text not in CHINESE}
    assert missing == {}, "add them to taskx/programs/dashboard/chinese.py"


def test_each_chinese_form_is_used():
    assert not CHINESE.keys() - USED.keys()


def test_both_forms_have_the_same_values():
    for english, chinese in CHINESE.items():
        forms = english.split("|")
        assert fields(chinese) == set().union(*map(fields, forms)), english
        assert "|" not in chinese, english
        words = chinese.replace("taskx worker", "")
        assert not re.search(r"[a-z]{2,} [a-z]{2,}", words), f"{english!r} is not translated"


def test_the_language_is_the_chosen_one_or_the_first_that_the_browser_accepts():
    assert words.language(None, "") == "en"
    assert words.language(None, "de, fr;q=0.5") == "en"
    assert words.language(None, "de, zh-CN;q=0.8, en;q=0.5") == "zh"
    assert words.language(None, "en-GB, zh;q=0.9") == "en"
    assert words.language("zh", "en") == "zh"
    assert words.language("en", "zh") == "en"
    assert words.language("xx", "zh") == "zh"
    assert words.language(None, "\x00;;q=nan, ,") == "en"


def test_a_text_is_translated_with_its_values():
    text = "{count} task|{count} tasks"
    assert words.translate("en", text, count=1) == "1 task"
    assert words.translate("en", text, count=0) == "0 tasks"
    assert words.translate("en", text, count=12345) == "12,345 tasks"
    assert words.translate("zh", text, count=12345) == "12,345 个任务"
    assert words.translate("en", "in {time}", time="{count}") == "in {count}"
    assert words.translate("zh", "never seen") == "never seen"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "–"),
        (0, "0 ms"),
        (0.00003, "<0.1 ms"),
        (0.0004, "0.4 ms"),
        (0.00196, "2 ms"),
        (0.0123, "12 ms"),
        (1, "1 s"),
        (1.26, "1.3 s"),
        (59.4, "59 s"),
        (90, "1.5 min"),
        (7200, "2 h"),
        (100_000, "1.2 d"),
    ],
)
def test_a_duration_has_a_fitting_unit(seconds, shown):
    assert Display("en", NOW).seconds(seconds) == shown


def test_times_are_shown_in_utc_and_by_their_distance():
    show = Display("en", NOW)
    at = datetime(2026, 3, 1, 12, 30, tzinfo=timezone(timedelta(hours=1)))
    assert str(show.moment(at)) == (
        '<time datetime="2026-03-01T11:30:00+00:00">2026-03-01 11:30:00</time>'
    )
    assert str(show.ago(at)) == (
        '<time datetime="2026-03-01T11:30:00+00:00" title="2026-03-01 11:30:00 UTC">30 min ago</time>'
    )
    assert ">30 min<" in show.age(at)
    assert ">in 2 h<" in show.ago(NOW + timedelta(hours=2))
    assert (show.moment(None), show.ago(None)) == ("–", "–")
    assert (show.clock(at), show.clock(at - timedelta(days=1))) == ("11:30", "02-28 11:30")


def test_numbers_shares_and_sizes_are_short():
    show = Display("en", NOW)
    assert [show.number(n) for n in (None, 0, 1234567, 0.5)] == ["–", "0", "1,234,567", "0.50"]
    assert [show.percent(n) for n in (None, 0, 0.004, 0.25, 1)] == [
        "–",
        "0%",
        "0.4%",
        "25%",
        "100%",
    ]
    assert [show.size(n) for n in (None, 0, 1023, 1536, 5 << 20, 3 << 50)] == [
        *("–", "0 B", "1023 B", "1.5 KB", "5.0 MB", "3072 TB"),
    ]


@pytest.mark.parametrize(
    ("spec", "english", "chinese"),
    [
        (every(90), "every 1.5 min", "每 1.5 分钟"),
        ("* * * * *", "every minute", "每分钟"),
        ("*/5 * * * *", "every 5 minutes", "每 5 分钟"),
        ("7 * * * *", "hourly, at minute 7", "每小时第 7 分"),
        ("0 */6 * * *", "every 6 hours, at minute 0", "每 6 小时，第 0 分"),
        ("0 3 * * *", "daily, at 03:00", "每天 03:00"),
        ("30 8,17 * * 1-5", "Monday to Friday, at 08:30, 17:30", "周一至周五 08:30, 17:30"),
        ("0 9 * * mon,3", "Monday, Wednesday, at 09:00", "周一, 周三 09:00"),
        ("0 0 1 * *", "monthly on day 1, at 00:00", "每月 1 日 00:00"),
        ("0 0 1 1 *", "0 0 1 1 *", "0 0 1 1 *"),
        ("1-5 * * * *", "1-5 * * * *", "1-5 * * * *"),
        ("0 0 * * 5#2", "0 0 * * 5#2", "0 0 * * 5#2"),
        ("0 0 1 * 5", "0 0 1 * 5", "0 0 1 * 5"),
        ("@daily", "@daily", "@daily"),
    ],
)
def test_a_schedule_is_said_in_words(spec, english, chinese):
    assert Display("en", NOW).spec(spec) == english
    assert Display("zh", NOW).spec(spec) == chinese
