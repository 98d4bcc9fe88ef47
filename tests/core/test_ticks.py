"""The ticks of schedules: cron expressions when clocks are shifted, intervals, missed ticks."""

from __future__ import annotations

import builtins
from datetime import datetime, timedelta, timezone
from functools import cache
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskx import ConfigurationError
from taskx.tasks.clock import to_datetime, to_ms
from taskx.tasks.ticks import (
    CronTicks,
    Every,
    IntervalTicks,
    between,
    check_spec,
    decide,
    every,
    latest,
    ticks_of,
    upcoming,
    zone,
)

MINUTE = 60_000
DAY = 1440 * MINUTE


def ms(*when: int, tz: str = "UTC") -> int:
    return to_ms(datetime(*when, tzinfo=ZoneInfo(tz)))


def local(tick: int, tz: str) -> str:
    return to_datetime(tick).astimezone(ZoneInfo(tz)).strftime("%d %H:%M %z")


def shown(expression: str, tz: str, day: tuple[int, int, int]) -> list[str]:
    """Return the ticks of a day of local time, and the first tick of the day after."""
    start = datetime(*day, tzinfo=ZoneInfo(tz)) - timedelta(seconds=1)
    found = []
    for tick in CronTicks(expression, ZoneInfo(tz)).after(to_ms(start)):
        found.append(local(tick, tz))
        if not found[-1].startswith(f"{day[2]:02} "):
            return found
    raise AssertionError("the ticks end")


# When clocks are shifted

SPRING = {
    "Europe/Berlin": (2026, 3, 29),  # 02:00 to 03:00
    "America/New_York": (2026, 3, 8),  # 02:00 to 03:00
    "Australia/Lord_Howe": (2026, 10, 4),  # 02:00 to 02:30
    "America/Havana": (2026, 3, 8),  # 00:00 to 01:00
}
AUTUMN = {
    "Europe/Berlin": (2026, 10, 25),  # 03:00 to 02:00
    "America/New_York": (2026, 11, 1),  # 02:00 to 01:00
    "Australia/Lord_Howe": (2026, 4, 5),  # 02:00 to 01:30
    "America/Havana": (2026, 11, 1),  # 01:00 to 00:00
}


@pytest.mark.parametrize(
    ("tz", "expression", "ticks"),
    [
        ("Europe/Berlin", "30 2 * * *", ["29 03:00 +0200", "30 02:30 +0200"]),
        ("Europe/Berlin", "0,30 2 * * *", ["29 03:00 +0200", "30 02:00 +0200"]),
        ("Europe/Berlin", "*/5 2 * * *", ["29 03:00 +0200", "30 02:00 +0200"]),
        ("Europe/Berlin", "30 2 29 3 *", None),
        ("America/New_York", "30 2 * * *", ["08 03:00 -0400", "09 02:30 -0400"]),
        ("Australia/Lord_Howe", "15 2 * * *", ["04 02:30 +1100", "05 02:15 +1100"]),
        ("Australia/Lord_Howe", "45 2 * * *", ["04 02:45 +1100", "05 02:45 +1100"]),
        ("America/Havana", "0 0 * * *", ["08 01:00 -0400", "09 00:00 -0400"]),
    ],
)
def test_a_local_time_that_does_not_exist_ticks_once_at_the_shift(tz, expression, ticks):
    if ticks is None:  # once a year, and this year at the shift
        first, second = islice(CronTicks(expression, ZoneInfo(tz)).after(ms(2026, 1, 1)), 2)
        assert (local(first, tz), local(second, tz)) == ("29 03:00 +0200", "29 02:30 +0200")
    else:
        assert shown(expression, tz, SPRING[tz]) == ticks


@pytest.mark.parametrize(
    ("tz", "expression", "ticks"),
    [
        ("Europe/Berlin", "30 2 * * *", ["25 02:30 +0200", "26 02:30 +0100"]),
        ("Europe/Berlin", "*/30 2 * * *", ["25 02:00 +0200", "25 02:30 +0200", "26 02:00 +0100"]),
        ("Europe/Berlin", "0 2,3 * * *", ["25 02:00 +0200", "25 03:00 +0100", "26 02:00 +0100"]),
        ("America/New_York", "30 1 * * *", ["01 01:30 -0400", "02 01:30 -0500"]),
        ("Australia/Lord_Howe", "45 1 * * *", ["05 01:45 +1100", "06 01:45 +1030"]),
        ("Australia/Lord_Howe", "0 2 * * *", ["05 02:00 +1030", "06 02:00 +1030"]),
        ("America/Havana", "30 0 * * *", ["01 00:30 -0400", "02 00:30 -0500"]),
    ],
)
def test_a_local_time_that_exists_twice_ticks_the_first_time(tz, expression, ticks):
    assert shown(expression, tz, AUTUMN[tz]) == ticks


@pytest.mark.parametrize("tz", AUTUMN)
@pytest.mark.parametrize("season", [SPRING, AUTUMN], ids=["spring", "autumn"])
@pytest.mark.parametrize("expression", ["*/15 * * * *", "*/15 0-23 * * *", "*/15 */1 * * *"])
def test_an_expression_for_every_hour_goes_by_elapsed_time(tz, season, expression):
    """It is not silent for an hour in autumn, and does not run an hour's ticks at once in spring."""
    start = to_ms(datetime(*season[tz], tzinfo=ZoneInfo(tz))) - 3 * 60 * MINUTE
    ticks = islice(CronTicks(expression, ZoneInfo(tz)).after(start - 1), 60)
    assert list(ticks) == [start + n * 15 * MINUTE for n in range(60)]


@pytest.mark.parametrize("tz", ["Europe/Berlin", "America/New_York", "America/Havana"])
@pytest.mark.parametrize("season", [SPRING, AUTUMN], ids=["spring", "autumn"])
def test_an_hourly_expression_ticks_every_hour(tz, season):
    start = to_ms(datetime(*season[tz], tzinfo=ZoneInfo(tz))) - 150 * MINUTE
    ticks = islice(CronTicks("30 * * * *", ZoneInfo(tz)).after(start - 1), 8)
    assert list(ticks) == [start + n * 60 * MINUTE for n in range(8)]


@pytest.mark.parametrize("tz", AUTUMN)
@pytest.mark.parametrize("season", [SPRING, AUTUMN], ids=["spring", "autumn"])
@pytest.mark.parametrize("expression", ["*/10 * * * *", "*/10 0-4 * * *", "40 * * * *"])
def test_ticks_near_a_shift_are_the_same_from_any_moment(tz, season, expression):
    ticks = CronTicks(expression, ZoneInfo(tz))
    midnight = to_ms(datetime(*season[tz], tzinfo=ZoneInfo(tz)))
    known = list(between(ticks, midnight - DAY, midnight + DAY))
    for moment in range(midnight - 120 * MINUTE, midnight + 300 * MINUTE, 5 * MINUTE):
        for asked in (moment - 1, moment, moment + 1):
            assert upcoming(ticks, asked) == next(tick for tick in known if tick > asked)


def test_a_day_that_a_zone_skipped_ticks_at_its_end():
    """Samoa had no 30 December in 2011: ticks of that day happen at midnight of the 31st."""
    ticks = islice(CronTicks("0 12 * * *", ZoneInfo("Pacific/Apia")).after(ms(2011, 12, 30)), 3)
    assert [local(tick, "Pacific/Apia") for tick in ticks] == [
        "31 00:00 +1400",
        "31 12:00 +1400",
        "01 12:00 +1400",
    ]


ZONES = [*SPRING, "UTC", "Asia/Kathmandu", "Pacific/Apia"]
DAYS = [*SPRING.values(), *AUTUMN.values(), (2011, 12, 30), (2026, 7, 1)]
minutes = st.frozensets(st.integers(0, 59), min_size=1, max_size=3)
hours = st.frozensets(st.integers(0, 23), min_size=1, max_size=4)


def listed(numbers: frozenset[int]) -> str:
    return ",".join(map(str, sorted(numbers)))


@cache
def arrivals(tz: str, day: tuple[int, int, int]) -> list[tuple[datetime, int]]:
    """Return each local minute around a day, with the first UTC minute at which it is reached."""
    start = to_ms(datetime(*day, tzinfo=timezone.utc)) - DAY
    found = []
    wall = None
    for moment in range(start, start + 3 * DAY, MINUTE):
        shown_there = to_datetime(moment).astimezone(ZoneInfo(tz)).replace(tzinfo=None)
        wall = wall or shown_there
        while wall <= shown_there:
            found.append((wall, moment))
            wall += timedelta(minutes=1)
    return found


@given(st.sampled_from(ZONES), st.sampled_from(DAYS), minutes, hours)
def test_every_local_time_ticks_exactly_once(tz, day, minutes, hours):
    """The expected ticks are computed minute by minute."""
    known = arrivals(tz, day)
    wanted = {at for wall, at in known if wall.minute in minutes and wall.hour in hours}
    ticks = CronTicks(f"{listed(minutes)} {listed(hours)} * * *", ZoneInfo(tz))
    assert list(between(ticks, known[0][1], known[-1][1])) == sorted(wanted)


fields = st.tuples(
    st.sampled_from(["*", "*/7", "0", "59", "5,35"]),
    st.sampled_from(["*", "*/2", "2", "0-3", "1,23"]),
    st.sampled_from(["*", "1", "29-31", "L"]),
    st.sampled_from(["*", "3,10,11", "2"]),
    st.sampled_from(["*", "SUN", "1-5", "MON#2"]),
)
crons = st.builds(
    lambda parts, tz: CronTicks(" ".join(parts), ZoneInfo(tz)), fields, st.sampled_from(ZONES)
)
intervals = st.builds(IntervalTicks, st.integers(100, 10 * DAY), st.integers(0, 10**13))
moments = st.integers(ms(1995, 1, 1), ms(2037, 1, 1))


@given(st.one_of(crons, intervals), moments, st.integers(0, 20))
def test_ticks_rise_and_are_the_same_from_any_beginning(ticks, moment, position):
    found = list(islice(ticks.after(moment), 21))
    assert all(a < b for a, b in pairwise([moment, *found]))
    assert list(islice(ticks.after(found[position]), 20 - position)) == found[position + 1 :]
    assert upcoming(ticks, found[position] - 1) == found[position]


@given(st.one_of(crons, intervals), moments, st.integers(0, 3 * DAY), st.integers(1, 5))
def test_latest_returns_the_last_ticks_of_a_span(ticks, start, length, most):
    span = list(islice(between(ticks, start, start + length), 5000))
    if len(span) < 5000:
        assert latest(ticks, start, start + length, most) == span[-most:]


def test_finding_the_latest_tick_costs_no_more_after_years():
    """A tick every minute for fifty years: 26 million ticks."""

    class Counting(IntervalTicks):
        computed = 0

        def after(self, moment):
            for tick in super().after(moment):
                Counting.computed += 1
                yield tick

    assert latest(Counting(MINUTE, 0), 0, ms(2020, 1, 1) + 59_999) == [ms(2020, 1, 1)]
    assert Counting.computed < 50


def test_ticks_end_with_the_calendar():
    last = ms(9999, 12, 31)
    assert upcoming(CronTicks("0 0 * * *", ZoneInfo("Europe/Berlin")), last) is None


# Intervals


def test_an_interval_is_counted_from_its_beginning_in_both_directions():
    ticks = IntervalTicks(30_000, since=10_000)
    assert list(islice(ticks.after(10_000), 2)) == [40_000, 70_000]
    assert list(islice(ticks.after(-1), 2)) == [10_000, 40_000]
    assert list(islice(ticks.after(-50_001), 2)) == [-50_000, -20_000]


def test_an_interval_needs_no_zone():
    assert ticks_of(every(0.25), "", 7) == IntervalTicks(250, 7)
    assert str(every(90)) == "every 90 s"


@pytest.mark.parametrize("seconds", [0, -1, 0.05, 1e10, float("nan"), "5", "soon", None, True])
def test_an_interval_must_be_a_number_of_seconds(seconds):
    with pytest.raises(ConfigurationError, match=r"seconds|finite|duration|unit"):
        every(seconds)


# Invalid specs and zones


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("61 * * * *", "Bad minute"),
        ("* 24 * * *", "Bad hour"),
        ("5-1 * * * *", "Bad minute"),
        ("*/0 * * * *", "Bad minute"),
        ("0 0 31 4 *", "Bad day-of-month|never matches"),
        ("0 0 * * MON#9", "Bad day-of-week"),
        ("@reboot", "'@reboot' is none of @hourly, @daily, "),
        ("daily", "has 1 field, but it must have five"),
        ("0 0 3 * * *", "has 6 fields, but it must have five"),
        ("", "has 0 fields"),
        (30, r"or every\(seconds\), not 30"),
        (None, "cron expression such as"),
    ],
)
def test_a_spec_that_cannot_tick_is_refused(spec, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        check_spec(spec)


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("@hourly", "2026-01-01T01:00"),
        ("@Daily", "2026-01-02T00:00"),
        ("@yearly", "2027-01-01T00:00"),
    ],
)
def test_a_name_stands_for_an_expression(name, moment):
    ticks = ticks_of(check_spec(name), "UTC", 0)
    start = to_ms(datetime(2026, 1, 1, tzinfo=timezone.utc), "")
    assert to_datetime(next(ticks.after(start))) == datetime.fromisoformat(f"{moment}:00+00:00")


def test_extra_spaces_in_an_expression_do_not_matter():
    assert check_spec("  0   3 * *  mon-fri ") == "0 3 * * mon-fri"
    assert check_spec(every(5)) == Every(5)


@pytest.mark.parametrize("name", ["Europe/Bonn", "", "Europe", "../zone", "a\0b", 7, None])
def test_an_unknown_zone_is_refused(name):
    with pytest.raises(ConfigurationError, match="Europe/Berlin"):
        zone(name)


def test_a_missing_cronsim_names_the_extra_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "cronsim":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigurationError, match=r"pip install 'taskx-queue\[schedules\]'"):
        check_spec("0 3 * * *")
    assert check_spec(every(5)) == Every(5)


# Due ticks

GRID = IntervalTicks(100, 0)


def test_a_tick_that_is_not_late_runs_whatever_the_policy():
    for misfire, grace in [("skip", 50), ("one", None), ("all", 50)]:
        assert decide(GRID, 1000, 1007, misfire, grace) == ([1000], 1100)


def test_the_policy_decides_which_missed_ticks_run():
    assert decide(GRID, 1000, 1370, "skip", 50) == ([], 1400)
    assert decide(GRID, 1000, 1370, "one", None) == ([1300], 1400)
    assert decide(GRID, 1000, 1370, "one", 50) == ([], 1400)
    assert decide(GRID, 1000, 1370, "all", 10_000) == ([1000, 1100, 1200, 1300], 1400)
    assert decide(GRID, 1000, 1370, "all", 200) == ([1200, 1300], 1400)


def test_a_grace_includes_its_end():
    assert decide(GRID, 1000, 1050, "skip", 50) == ([1000], 1100)
    assert decide(GRID, 1000, 1051, "skip", 50) == ([], 1100)


def test_many_missed_ticks_are_decided_in_batches():
    first = decide(GRID, 0, 100_000, "all", 10**9, most=100)
    assert (first.run[0], first.run[-1], len(first.run)) == (0, 9900, 100)
    assert first.next == 10_000
    second = decide(GRID, first.next, 100_000, "all", 10**9, most=100)
    assert second.run[0] == 10_000


def test_ticks_left_for_later_may_become_too_late():
    assert decide(GRID, 10_000, 50_020, "all", 500, most=100) == (
        [49_600, 49_700, 49_800, 49_900, 50_000],
        50_100,
    )


policies = st.one_of(
    st.tuples(st.just("skip"), st.integers(0, 10 * DAY)),
    st.tuples(st.just("one"), st.one_of(st.none(), st.integers(0, 10 * DAY))),
    st.tuples(st.just("all"), st.integers(0, 10 * DAY)),
)


@given(
    st.one_of(crons, intervals),
    moments,
    st.lists(st.integers(-3 * DAY, 3 * DAY), min_size=1, max_size=15),
    policies,
    st.integers(1, 5),
)
def test_no_tick_runs_twice_however_the_clock_is_set(ticks, start, steps, policy, most):
    """Also if it is set forward and back: each tick is decided about only once."""
    misfire, grace = policy
    now, due = start, upcoming(ticks, start)
    run: list[int] = []
    for step in steps:
        now += step
        if due is None or now < due:
            continue
        decision = decide(ticks, due, now, misfire, grace, most)
        assert all(due <= tick <= now for tick in decision.run)
        assert all(tick >= now - grace for tick in decision.run if grace is not None)
        assert decision.next > due
        assert len(decision.run) <= (most if misfire == "all" else 1)
        run += decision.run
        due = decision.next
    assert all(a < b for a, b in pairwise(run))
    assert all(upcoming(ticks, tick - 1) == tick for tick in run)


@given(st.integers(0, 50), st.integers(0, 50_000), st.integers(0, 20_000))
def test_misfire_all_runs_each_tick_once(position, lateness, grace):
    due = position * 100
    now = due + lateness
    run: list[int] = []
    while due <= now:
        decision = decide(GRID, due, now, "all", grace, most=7)
        run += decision.run
        due = decision.next
    first = max(position * 100, now - grace)
    assert run == [tick for tick in range(0, now + 1, 100) if tick >= first]


def test_an_interval_ends_with_the_calendar():
    last = to_ms(datetime.max.replace(tzinfo=timezone.utc))
    assert list(IntervalTicks(1000, 0).after(last - 2500)) == [last - 1999, last - 999]
    assert upcoming(IntervalTicks(1000, 0), last) is None
