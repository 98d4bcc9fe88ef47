"""A child of the benchmark: measures one cell of one peer, and prints the figures as JSON."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import closing

from benchmarks.children import end_with_parent
from benchmarks.harness import SLEEPERS, WORKERS
from benchmarks.peers import named
from benchmarks.peers.base import MEASURES, worked_elsewhere


def main(name: str, what: str, count: int, folder: str, url: str) -> None:
    """Measure and print."""
    end_with_parent()
    logging.getLogger("huey").setLevel(logging.ERROR)
    workers = SLEEPERS if what == "sleepers" else WORKERS
    with closing(named(name, url).make(folder, workers)) as peer:
        if what == "elsewhere":
            with worked_elsewhere(peer, name, folder):
                figures = MEASURES[what](peer, count)
        else:
            figures = MEASURES[what](peer, count)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])
