"""Pictures of flows: the layout of the graph, and its SVG."""

from __future__ import annotations

from datetime import datetime, timezone
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskx.programs.dashboard.display import Display
from taskx.programs.dashboard.layout import MOST_IN_LAYER, MOST_LAYERS, Dot, lay_out
from taskx.programs.dashboard.pictures import picture

HOSTILE = """<script>alert('"&')</script>"""
SHOW = Display("en", datetime(2026, 3, 1, tzinfo=timezone.utc))


def dots(**parents):
    return [Dot(name, name[0], "pending", above.split()) for name, above in parents.items()]


def layers(layout):
    return [
        ["+".join(dot.id for dot in layout.boxes[number].dots) for number in row]
        for row in layout.layers
    ]


def test_parents_are_above_their_children():
    layout = lay_out(dots(d="b c", a="", b="a", c="a", e="a d"))
    assert [sorted(row) for row in layers(layout)] == [["a"], ["b", "c"], ["d"], ["e"]]


def test_the_order_of_a_layer_follows_the_parents():
    layout = lay_out(dots(a="", b="", c="", x="c", y="a", z="b"))
    assert layers(layout) == [["a", "b", "c"], ["y", "z", "x"]]


def test_unknown_parents_and_circles_do_no_harm():
    layout = lay_out(dots(a="gone", b="c a", c="b"))
    assert [sorted(row) for row in layers(layout)] == [["a"], ["b", "c"]]
    assert lay_out([]).layers == []


def test_many_tasks_that_are_alike_share_a_box():
    graph = [Dot("first", "split", "completed")]
    for number in range(400):
        status = "failed" if number % 4 == 0 else "completed"
        graph += [
            Dot(f"a{number}", "fetch", status, ["first"]),
            Dot(f"b{number}", "parse", "pending", [f"a{number}"]),
        ]
    graph.append(Dot("last", "merge", "pending", [f"b{number}" for number in range(400)]))
    layout = lay_out(graph)
    assert [len(box.dots) for box in layout.boxes] == [1, 400, 400, 1]
    assert layout.boxes[1].statuses == {"failed": 100, "completed": 300}
    assert [box.parents for box in layout.boxes] == [set(), {0}, {1}, {2}]
    assert layout.left_out == 0


def test_few_tasks_are_not_folded():
    graph = [Dot("first", "a", "completed")] + [
        Dot(str(number), "b", "pending", ["first"]) for number in range(MOST_IN_LAYER)
    ]
    assert len(lay_out(graph).boxes) == MOST_IN_LAYER + 1
    graph.append(Dot("one more", "b", "pending", ["first"]))
    assert [len(box.dots) for box in lay_out(graph).boxes] == [1, MOST_IN_LAYER + 1]


def test_tasks_that_are_not_alike_share_a_box_if_there_are_too_many():
    graph = [Dot(f"p{number}", "p", "pending") for number in range(70)]
    graph += [  # each task has parents of its own, so that none are alike
        Dot(f"c{number}", "c", "pending", [f"p{other}" for other in range(number + 1)])
        for number in range(70)
    ]
    assert [len(box.dots) for box in lay_out(graph).boxes] == [70, 70]
    graph = [Dot(str(number), f"type{number}", "pending") for number in range(70)]
    [box] = lay_out(graph).boxes
    assert len(box.types) == 70


def test_a_very_deep_flow_is_cut():
    graph = [Dot("0", "a", "pending")] + [
        Dot(str(number), "a", "pending", [str(number - 1)]) for number in range(1, 1000)
    ]
    layout = lay_out(graph)
    assert len(layout.layers) == MOST_LAYERS
    assert layout.left_out == 1000 - MOST_LAYERS


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sets(st.integers(0, 120), max_size=4)), max_size=120
    )
)
def test_every_task_is_in_one_box_below_its_parents(graph):
    made = [
        Dot(str(number), type, "pending", [str(parent) for parent in sorted(above)])
        for number, (type, above) in enumerate(graph)
    ]
    layout = lay_out(made)
    drawn = [dot.id for box in layout.boxes for dot in box.dots]
    assert len(drawn) == len({*drawn}) == len(made) - layout.left_out
    assert sorted(number for row in layout.layers for number in row) == [*range(len(layout.boxes))]
    for row in layout.layers:
        assert [layout.boxes[number].place for number in row] == [*range(len(row))]
    circles = any(int(dot.id) <= int(parent) for dot in made for parent in dot.parents)
    for box in layout.boxes:
        assert circles or all(layout.boxes[parent].layer < box.layer for parent in box.parents)


def parse(markup):
    root = ET.fromstring(f"<div>{markup}</div>")
    assert not list(root.iter("script"))
    return root


def test_a_box_has_its_type_its_status_and_a_link():
    graph = [Dot(HOSTILE, HOSTILE, "failed"), Dot("b", "mail", "running", [HOSTILE])]
    root = parse(picture(graph, SHOW, HOSTILE, lambda box: f"/task?id={box.dots[0].id}"))
    one, other = root.iter("a")
    assert (other.get("href"), other.get("aria-label")) == ("/task?id=b", "mail: running")
    assert [text.text for text in other.iter("text")] == ["mail", "running"]
    assert next(other.iter("rect")).get("class") == "running"
    assert one.get("aria-label") == f"{HOSTILE}: failed"
    assert next(one.iter("text")).text.startswith("<script>")
    assert len(list(root.iter("path"))) == 1


def test_a_folded_box_says_how_many_tasks_have_each_status():
    graph = [
        Dot(str(number), "mail", "failed" if number < 5 else "completed") for number in range(100)
    ]
    [box] = parse(picture(graph, SHOW, "t", lambda box: "/")).iter("a")
    assert [text.text for text in box.iter("text")] == ["100 × mail", "95 completed, 5 failed"]
    assert next(box.iter("rect")).get("class") == "failed"


@pytest.mark.parametrize("number", [1, 7, 60, 5000])
def test_all_boxes_are_inside_the_picture(number):
    graph = [Dot(str(n), "ab"[n % 2], "pending", [str(n // 3)] * (n > 0)) for n in range(number)]
    root = parse(picture(graph, SHOW, "t", lambda box: "/"))
    [svg] = root.iter("svg")
    for rect in root.iter("rect"):
        assert 0 <= float(rect.get("x")) <= float(svg.get("width")) - 168
        assert 0 <= float(rect.get("y")) <= float(svg.get("height")) - 44


def test_a_cut_picture_says_how_many_tasks_it_does_not_show():
    graph = [Dot(str(n), "a", "pending", [str(n - 1)] * (n > 0)) for n in range(103)]
    assert "3 tasks further down are not shown." in picture(graph, SHOW, "t", lambda box: "/")
