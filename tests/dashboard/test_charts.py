"""Charts as SVG: their numbers, their words, and no way in for hostile texts."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from xml.etree import ElementTree as ET

import pytest

from taskx import History, Percentiles, TypeHistory
from taskx.programs.dashboard.charts import Charts
from taskx.programs.dashboard.display import Display

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=timezone.utc)
HOSTILE = """<script>alert('"&')</script>"""


def parse(markup):
    """Parse HTML that is XML, too; check that it has no styles and no scripts."""
    text = str(markup).replace(" scope=row", "").replace(" scope=col", "")
    root = ET.fromstring(f"<div>{text}</div>")
    for element in root.iter():
        assert element.tag not in ("script", "style")
        assert not [name for name in element.attrib if name == "style" or name.startswith("on")]
    return root


def history(completed, failed, **options):
    return History(
        **{
            "start": NOW - timedelta(hours=1),
            "interval": 3600 / len(completed),
            "types": {},
            "since": None,
            "complete": True,
            **options,
            "completed": tuple(completed),
            "failed": tuple(failed),
        }
    )


@pytest.fixture(params=["en", "zh"])
def charts(request):
    return Charts(Display(request.param, NOW))


def test_bars_over_time_have_a_bar_for_each_interval_and_part(charts):
    root = parse(charts.over_time(history([0, 4, 2], [0, 0, 2]), HOSTILE))
    [svg] = root.iter("svg")
    bars = [(rect.get("class"), float(rect.get("height"))) for rect in svg.iter("rect")]
    assert bars == [("ok", 100), ("bad", 50), ("ok", 50)]
    assert [mark.text for mark in root.iter("span")][:3] == ["4", "2", "0"]
    names = {element.get("id"): element.text for element in svg if element.get("id")}
    title, description = (names[name] for name in svg.get("aria-labelledby").split())
    assert (svg.get("role"), title) == ("img", HOSTILE)
    assert "6" in description
    assert "2" in description
    rows = [[cell.text for cell in row] for row in root.iter("tr")]
    assert rows[1:] == [["11:20", "4", "0"], ["11:40", "2", "2"]]


def test_an_empty_chart_has_no_bars(charts):
    root = parse(charts.over_time(history([0, 0], [0, 0]), "t"))
    assert not list(root.iter("rect"))


def test_intervals_that_may_miss_tasks_are_marked(charts):
    since = NOW - timedelta(minutes=31)
    root = parse(charts.over_time(history([0] * 6, [1] * 6, since=since, complete=False), "t"))
    [hollow] = [rect for rect in root.iter("rect") if rect.get("class") == "hollow"]
    assert hollow.get("width") == "3"
    assert "11:29" in "".join(root.itertext())


def test_two_charts_of_a_page_have_different_ids(charts):
    one, other = (parse(charts.over_time(history([1], [0]), "t")) for _ in range(2))
    ids = [{e.get("id") for e in root.iter() if e.get("id")} for root in (one, other)]
    assert len(ids[0]) == 3
    assert not ids[0] & ids[1]


def test_a_histogram_leaves_out_empty_groups_at_its_ends(charts):
    times = TypeHistory(completed=(8,), failed=(0,), run_times=(0, 2, 0, 6, 0, 0))
    root = parse(charts.run_times(times, (0.001, 0.01, 0.1, 1, 10), "t"))
    heights = [float(rect.get("height")) for rect in root.iter("rect")]
    assert [round(height, 1) for height in heights] == [33.3, 100]
    assert "≤ 1" in [*root.iter("span")][-3].text
    last = TypeHistory(completed=(1,), failed=(0,), run_times=(0, 1))
    assert "> 1" in str(charts.run_times(last, (1.0,), "t")).replace("&gt;", ">")


def test_the_latency_has_a_line_for_each_share_and_values_at_its_axis(charts):
    latency = (None, Percentiles(0.1, 0.2), Percentiles(0.2, 0.4))
    root = parse(charts.latency(history([0] * 3, [0] * 3, start_latency=latency), "t"))
    lines = {line.get("class"): line.get("points") for line in root.iter("polyline")}
    # Each interval has its width, so that a single one can be seen.
    assert lines == {"first": "1,50 2,50 2,0 3,0", "second": "1,75 2,75 2,50 3,50"}
    assert [mark.text[:3] for mark in root.iter("span")][:3] == ["400", "200", "0"]
    none = parse(charts.latency(history([0], [0], start_latency=(None,)), "t"))
    assert not list(none.iter("svg"))


def test_a_histogram_without_tasks_says_so(charts):
    none = TypeHistory(completed=(), failed=(), run_times=(0, 0))
    assert not list(parse(charts.run_times(none, (1.0,), "t")).iter("svg"))


def test_a_sparkline_reaches_from_bottom_to_top(charts):
    root = parse(charts.sparkline([0, 5, 10], HOSTILE))
    [line] = root.iter("polyline")
    assert line.get("points") == "0,19 1,10 2,1"
    assert HOSTILE in next(root.iter("title")).text
    assert parse(charts.sparkline([], "t")).find("svg") is not None
    assert parse(charts.sparkline([0], "t")).find("svg") is not None


def test_a_bar_of_shares_has_a_part_for_each_status(charts):
    root = parse(charts.shares({"failed": 1, "completed": 3, "running": 0, HOSTILE: 4}, HOSTILE))
    parts = [(r.get("class"), r.get("x"), r.get("width")) for r in root.iter("rect")]
    assert parts == [
        *(("fill completed", "0", "37.5"), ("fill failed", "37.5", "12.5")),
        (f"fill {HOSTILE}", "50", "50"),
    ]
    assert parse(charts.shares({}, "t")).find("svg") is not None
