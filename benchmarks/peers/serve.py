"""A child of the benchmark: runs the tasks of a peer to which another process submits."""

from __future__ import annotations

import logging
import sys
from contextlib import closing

from benchmarks.harness import WORKERS
from benchmarks.peers import named


def main(name: str, folder: str) -> None:
    """Run tasks until the standard input ends."""
    logging.getLogger("huey").setLevel(logging.ERROR)
    with closing(named(name).make(folder, WORKERS)) as peer:
        peer.work()
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
