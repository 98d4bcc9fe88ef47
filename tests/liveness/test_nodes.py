"""Tests of nodes on every repository."""

from __future__ import annotations

import attrs
import pytest
from storage.repositories import MAKERS

from taskx.stores.liveness.base import About, Node
from taskx.tasks.rate import NO_RATES, Limit, Rate, Rates
from taskx.testing import ManualClock

KINDS = [*MAKERS]


@pytest.fixture(params=KINDS)
def liveness(request, tmp_path):
    with MAKERS[request.param](tmp_path, ManualClock()) as repository:
        yield repository.liveness


def test_a_node_is_recorded_until_it_leaves(liveness):
    about = About(host="h", pid=7, python="3.13.1", version="1.2", started_at=5, buffer_size=9)
    node = Node(id="n1", name="host process 1", types=("t", "u"), about=about)
    liveness.join(node)
    assert liveness.at_work
    [known] = liveness.nodes()
    assert attrs.evolve(known, beat_at=None) == attrs.evolve(node, alive=True)
    liveness.leave("n1")
    assert list(liveness.nodes()) == []
    assert not liveness.at_work
    liveness.leave("n1")


def test_the_types_of_a_node_are_recorded(liveness):
    liveness.join(Node(id="n1", name="one", types=("t",)))
    changed = Node(
        id="n1",
        name="one",
        types=("t", "u"),
        limits={"type/t": Limit(2, Rates([Rate(3, 60.0, 1, "tokens")]), "global")},
        limited={"t": ("type/t", "named")},
        declared={"named": Limit(1, NO_RATES, "global")},
        own_limits={"t": None, "u": Limit(1, NO_RATES, "node")},
        workers=7,
    )
    liveness.record(changed)
    liveness.record(attrs.evolve(changed, id="unknown"))
    assert [attrs.evolve(node, beat_at=None) for node in liveness.nodes()] == [
        attrs.evolve(changed, alive=True)
    ]
    liveness.record(Node(id="n1", name="one", types=("t",)))
    assert [node.limits for node in liveness.nodes()] == [{}]
    liveness.leave("n1")


@pytest.mark.parametrize(
    "liveness",
    [kind for kind in KINDS if kind.startswith(("sqlite", "mongo", "example"))],
    indirect=True,
)
def test_a_stopping_node_is_recorded_if_it_can_outlive_its_process(liveness):
    for node in ("n1", "n10"):
        liveness.join(Node(id=node, name="one"))
    liveness.mark_stopping("n1")
    liveness.mark_stopping("unknown")
    assert {node.id: node.stopping for node in liveness.nodes()} == {"n1": True, "n10": False}
    liveness.leave("n1")
    assert [node.id for node in liveness.nodes()] == ["n10"]
    liveness.leave("n10")
