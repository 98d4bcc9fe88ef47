"""The layout of a graph of tasks in layers: parents above their children.

Tasks that are alike are folded into one box, so that a graph of thousands of tasks stays readable.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

import attrs

#: Most boxes of a picture, and of a layer of it, which fits a page. With more tasks, those that are alike
#: share a box.
MOST_BOXES, MOST_IN_LAYER = 60, 7
#: Most layers of a picture. The tasks below them are left out.
MOST_LAYERS = 100
# Rounds in which the boxes of a layer are sorted by their neighbours.
_ROUNDS = 4


@attrs.frozen
class Dot:
    """A task of a graph.

    Attributes:
        id: the id of the task.
        type: its type.
        status: its status.
        parents: the ids of its parents. Those that are not in the graph are ignored.
    """

    id: str
    type: str
    status: str
    parents: Sequence[str] = ()


@attrs.define
class Box:
    """A box of a picture: one task, or several that are alike.

    Attributes:
        dots: its tasks.
        layer: its layer, from 0.
        parents: the numbers of the boxes above it that it depends on.
        place: its place in its layer, from 0.
    """

    dots: list[Dot]
    layer: int
    parents: set[int] = attrs.field(factory=set)
    place: int = 0

    @property
    def types(self) -> list[str]:
        """The different types of its tasks, sorted."""
        return sorted({dot.type for dot in self.dots})

    @property
    def statuses(self) -> Mapping[str, int]:
        """The number of its tasks in each status."""
        return Counter(dot.status for dot in self.dots)


@attrs.frozen
class Layout:
    """A graph in layers.

    Attributes:
        boxes: the boxes; their numbers are their places in this list.
        layers: the numbers of the boxes of each layer, from left to right.
        left_out: the number of tasks that are not in the picture.
    """

    boxes: Sequence[Box]
    layers: Sequence[Sequence[int]]
    left_out: int

    @property
    def width(self) -> int:
        """The number of boxes in the widest layer."""
        return max(map(len, self.layers), default=0)


def lay_out(dots: Sequence[Dot], most: int = MOST_BOXES) -> Layout:
    """Lay out a graph of tasks with at most about ``most`` boxes.

    Each step folds more: no tasks; those of the same type with parents and children that are alike; those
    of the same type in the same layer; all of a layer.
    """
    known = {dot.id: dot for dot in dots}
    parents = {
        dot.id: [parent for parent in dict.fromkeys(dot.parents) if parent in known]
        for dot in known.values()
    }
    depth = _depths(parents)
    shown = [dot for dot in known.values() if depth[dot.id] < MOST_LAYERS]
    own: dict[str, Hashable] = {dot.id: dot.id for dot in shown}
    by_type: dict[str, Hashable] = {dot.id: (depth[dot.id], dot.type) for dot in shown}
    folded = own
    if not _fits(folded, depth, most):
        folded = _alike(by_type, parents)
    if not _fits(folded, depth, most):
        folded = by_type
    if len({*folded.values()}) > most:
        folded = {dot.id: depth[dot.id] for dot in shown}
    boxes = _boxes(shown, folded, parents, depth)
    return Layout(boxes, _sorted_layers(boxes), len(known) - len(shown))


def _fits(folded: Mapping[str, Hashable], depth: Mapping[str, int], most: int) -> bool:
    """Return True if neither the boxes nor those of a layer are too many."""
    boxes = {box: depth[task_id] for task_id, box in folded.items()}
    return len(boxes) <= most and max(Counter(boxes.values()).values(), default=0) <= MOST_IN_LAYER


def _depths(parents: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return the layer of each task: one below its lowest parent. Tasks in a circle get the last layers."""
    children: defaultdict[str, list[str]] = defaultdict(list)
    missing = {task_id: len(above) for task_id, above in parents.items()}
    for task_id, above in parents.items():
        for parent in above:
            children[parent].append(task_id)
    depth = {task_id: 0 for task_id, number in missing.items() if not number}
    waiting = [*depth]
    for parent in waiting:  # grows while it is read
        for child in children[parent]:
            missing[child] -= 1
            if not missing[child]:
                depth[child] = 1 + max(depth[above] for above in parents[child])
                waiting.append(child)
    last = 1 + max(depth.values(), default=-1)
    return {task_id: depth.get(task_id, last) for task_id in parents}


def _alike(
    begin: Mapping[str, Hashable], parents: Mapping[str, Sequence[str]]
) -> dict[str, Hashable]:
    """Return a class for each task. Tasks of one class have parents and children of the same classes."""
    children: defaultdict[str, list[str]] = defaultdict(list)
    for task_id in begin:
        for parent in parents[task_id]:
            children[parent].append(task_id)
    classes, number = _numbered(begin), len({*begin.values()})
    while True:
        finer: dict[str, Hashable] = {
            task_id: (
                classes[task_id],
                frozenset(classes[parent] for parent in parents[task_id]),
                frozenset(classes[child] for child in children[task_id]),
            )
            for task_id in begin
        }
        if (count := len({*finer.values()})) == number:
            return {**classes}
        classes, number = _numbered(finer), count


def _numbered(classes: Mapping[str, Hashable]) -> dict[str, int]:
    numbers = {key: number for number, key in enumerate(dict.fromkeys(classes.values()))}
    return {task_id: numbers[key] for task_id, key in classes.items()}


def _boxes(
    dots: Sequence[Dot],
    folded: Mapping[str, Hashable],
    parents: Mapping[str, Sequence[str]],
    depth: Mapping[str, int],
) -> list[Box]:
    number = _numbered(folded)
    boxes: dict[int, Box] = {}
    for dot in dots:
        box = boxes.setdefault(number[dot.id], Box([], depth[dot.id]))
        box.dots.append(dot)
        box.parents.update(
            number[above]
            for above in parents[dot.id]
            if above in number and number[above] != number[dot.id]
        )
    return [boxes[place] for place in range(len(boxes))]


def _sorted_layers(boxes: Sequence[Box]) -> list[list[int]]:
    """Sort each layer by the mean place of its neighbours, so that few lines cross."""
    layers: defaultdict[int, list[int]] = defaultdict(list)
    children: defaultdict[int, list[int]] = defaultdict(list)
    for number, box in enumerate(boxes):
        layers[box.layer].append(number)
        for parent in box.parents:
            children[parent].append(number)
    rows = [layers[layer] for layer in sorted(layers)]
    _place(boxes, rows)
    for round in range(_ROUNDS):
        downwards = round % 2 == 0
        for row in rows if downwards else reversed(rows):
            near = {
                number: boxes[number].parents if downwards else children[number] for number in row
            }
            row.sort(
                key=lambda number: (
                    sum(boxes[other].place for other in near[number]) / len(near[number])
                    if near[number]
                    else boxes[number].place
                )
            )
            _place(boxes, [row])
    return rows


def _place(boxes: Sequence[Box], rows: Sequence[Sequence[int]]) -> None:
    for row in rows:
        for place, number in enumerate(row):
            boxes[number].place = place
