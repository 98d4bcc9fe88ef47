"""A child of the benchmark: measures one thing of one peer, and prints the figures as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from benchmarks.children import end_with_parent
from benchmarks.harness import NAP, SLEEPERS, Stopwatch
from benchmarks.peers import KINDS, on_mongo
from benchmarks.peers.base import MEASURES


def sleepers(count: int) -> dict[str, float]:
    """How long sleeping tasks take on the standard library's pool."""
    with Stopwatch() as watch, ThreadPoolExecutor(SLEEPERS) as pool:
        for _ in range(count):
            pool.submit(time.sleep, NAP)
    return {"sleepers": watch.seconds / (count * NAP / SLEEPERS)}


def main(name: str, what: str, count: int, folder: str, url: str) -> None:
    """Measure."""
    end_with_parent()
    logging.getLogger("huey").setLevel(logging.ERROR)
    if what == "sleepers":
        figures = sleepers(count)
    else:
        [kind] = [kind for kind in (on_mongo(url) if url else KINDS) if kind.name == name]
        with closing(kind.make(folder)) as peer:
            figures = MEASURES[what](peer, count)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])
