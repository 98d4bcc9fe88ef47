"""Hosts that share the tasks in a PostgreSQL database.

    python examples/hosts.py work NAME postgresql://app@server/shop     # on each host, until Ctrl-C
    python examples/hosts.py submit 100 postgresql://app@server/shop    # on any host

``submit`` waits for the results, and prints how many tasks ran on which host. Kill a host, or unplug it:
after its lease the others run its tasks. No clock of a host, or of the server, matters for that.
"""

import sys
import threading
import time
from collections import Counter
from contextlib import suppress

from taskx import Config, PostgresRepository, Queue


def work(name: str, url: str) -> None:
    """Run tasks on this host until Ctrl-C."""
    queue = Queue(PostgresRepository.from_url(url), Config(worker_num=4))

    @queue.executor("resize")
    def resize(number: int) -> str:
        time.sleep(0.05)  # blocks on purpose: it stands for real work
        return name

    with queue:
        print(f"{name} is ready", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


def submit(count: int, url: str) -> None:
    """Store some tasks, and print which host ran how many."""
    queue = Queue(PostgresRepository.from_url(url))
    queue.declare("resize")  # its executor is elsewhere
    with queue.repository:
        handles = [queue.submit("resize", {"number": number}) for number in range(count)]
        ran = Counter(handle.result() for handle in handles)
        print(", ".join(f"{name}: {ran[name]}" for name in sorted(ran)))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["work", name, url]:
            work(name, url)
        case ["submit", count, url] if count.isdecimal():
            submit(int(count), url)
        case _:
            sys.exit(__doc__)
