"""Pictures of flows: a graph of tasks as SVG, parents above their children."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from taskx.programs.dashboard.charts import STATUSES
from taskx.programs.dashboard.display import Display
from taskx.programs.dashboard.layout import Box, Dot, Layout, lay_out

_WIDTH, _HEIGHT = 168, 44
_GAP, _ROW = 16, 84
_LETTERS = 20


def picture(
    dots: Sequence[Dot], display: Display, title: str, link: Callable[[Box], str]
) -> Markup:
    """Return the picture of a graph of tasks.

    Args:
        dots: the tasks.
        display: the words of the page.
        title: the title for screen readers.
        link: returns the URL of a box: of its task, or of the list of its tasks.
    """
    layout = lay_out(dots)
    width = max(1, layout.width) * (_WIDTH + _GAP) + _GAP
    height = max(1, len(layout.layers)) * _ROW - (_ROW - _HEIGHT) + 2 * _GAP
    lefts = _lefts(layout, width)
    lines = Markup("").join(
        _line(lefts[parent], layout.boxes[parent].layer, lefts[number], box.layer)
        for number, box in enumerate(layout.boxes)
        for parent in sorted(box.parents)
    )
    boxes = Markup("").join(
        _box(layout.boxes[number], lefts[number], display, link(layout.boxes[number]))
        for row in layout.layers
        for number in row
    )
    picture = Markup(
        '<svg class="flow {}" role="group" aria-label="{}" width="{w}" height="{h}" viewBox="0 0 {w} {h}">'
        "{}{}</svg>"
    ).format("broad" if layout.width > 3 else "", title, lines, boxes, w=width, h=height)
    if not layout.left_out:
        return picture
    text = display.say(
        "{count} task further down is not shown.|{count} tasks further down are not shown.",
        count=layout.left_out,
    )
    return picture + Markup('<p class="muted">{}</p>').format(text)


def _lefts(layout: Layout, width: int) -> dict[int, float]:
    """Return the left edge of each box; each layer is in the middle of the picture."""
    return {
        number: (width - len(row) * (_WIDTH + _GAP) + _GAP) / 2 + place * (_WIDTH + _GAP)
        for row in layout.layers
        for place, number in enumerate(row)
    }


def _line(left: float, layer: int, to_left: float, to_layer: int) -> Markup:
    x, y = left + _WIDTH / 2, _GAP + layer * _ROW + _HEIGHT
    to_x, to_y = to_left + _WIDTH / 2, _GAP + to_layer * _ROW
    middle = (y + to_y) / 2
    return Markup('<path d="M{:g} {:g}C{:g} {m:g} {:g} {m:g} {:g} {:g}"/>').format(
        x, y, x, to_x, to_x, to_y, m=middle
    )


def _box(box: Box, left: float, display: Display, link: str) -> Markup:
    name = _short(", ".join(box.types))
    many = len(box.dots) > 1
    head = f"{len(box.dots):,} × {name}" if many else name
    statuses = [status for status in STATUSES if box.statuses.get(status)]
    words = [
        f"{box.statuses[status]:,} {display.say(status)}" if many else display.say(status)
        for status in statuses
    ]
    text = ", ".join(words)
    long = f"{', '.join(box.types)}: {text}"
    return Markup(
        '<a href="{}" aria-label="{}"><title>{}</title><rect class="{}" x="{x:g}" y="{y}" width="{w}" '
        'height="{h}" rx="6"/><text x="{tx:g}" y="{}">{}</text><text class="small" x="{tx:g}" y="{}">{}'
        "</text></a>"
    ).format(
        link,
        long,
        long,
        _worst(statuses),
        _GAP + box.layer * _ROW + 18,
        head,
        _GAP + box.layer * _ROW + 35,
        _short(text, 28),
        x=left,
        y=_GAP + box.layer * _ROW,
        w=_WIDTH,
        h=_HEIGHT,
        tx=left + _WIDTH / 2,
    )


def _worst(statuses: Sequence[str]) -> str:
    """Return the status that gives a box its colour."""
    order = ("failed", "running", "pending", "cancelled", "completed")
    return next((status for status in order if status in statuses), "")


def _short(text: str, most: int = _LETTERS) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
