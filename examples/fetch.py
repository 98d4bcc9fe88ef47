"""Fetch many URLs, with retries and a progress bar. A second run goes on where the first one stopped.

    python examples/fetch.py urls.txt              # a file with one URL in each line
    python examples/fetch.py urls.txt --again      # try the URLs that failed once more

It prints the size and the hash of each page in the order of the file, and then the errors. Stop it with
Ctrl-C, or kill it, and run it again: what was fetched is not fetched again. The bar needs ``pip install
'taskx-queue[progress]'``; without it, or if the output is no terminal, a line is written now and then.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from taskx import Config, Permanent, Queue, RetryPolicy, SQLiteRepository, TaskFailed, TaskxError

TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
RETRY = RetryPolicy(
    4, backoff="exponential", base=0.5, max_delay=30, retry_on=(OSError, HTTPException)
)


def make_queue(database: str, workers: int) -> Queue:
    """Return the queue. Threads that wait for a network cost little, so there may be many."""
    queue = Queue(SQLiteRepository(database), Config(worker_num=workers))

    @queue.executor("fetch", retry=RETRY)
    def fetch(url: str) -> dict[str, object]:
        try:
            with urlopen(url, timeout=20) as response:
                page = response.read()
        except HTTPError as error:
            with error:
                if error.code in TRANSIENT:
                    raise  # it is an OSError, and is retried
                raise Permanent(f"{error.code} {error.reason}") from None
        return {"bytes": len(page), "sha256": hashlib.sha256(page).hexdigest()}

    return queue


def fetch_all(queue: Queue, urls: list[str], again: bool) -> list[str]:
    """Print a line for each URL, and return the errors."""
    errors = []
    pages = queue.map(
        "fetch",
        [{"url": url} for url in urls],
        progress=True,
        retry_failed=again,
        return_exceptions=True,
    )
    for url, page in zip(urls, pages, strict=True):
        if isinstance(page, TaskFailed):
            errors.append(f"{url}: {page.error}")
        elif isinstance(page, Exception):
            errors.append(f"{url}: {page}")
        else:
            print(f"{page['sha256'][:12]} {page['bytes']:>9} {url}")
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch many URLs.")
    parser.add_argument("file", type=Path, help="a file with one URL in each line")
    parser.add_argument("--db", default="fetch.db", help="the file of the tasks (fetch.db)")
    parser.add_argument("--workers", type=int, default=32, help="how many at once (32)")
    parser.add_argument("--again", action="store_true", help="try URLs again that have failed")
    args = parser.parse_args()
    # The errors are printed at the end. The log would also give a traceback for each.
    logging.getLogger("taskx").setLevel(logging.CRITICAL)
    try:
        urls = args.file.read_text().split()
    except (OSError, ValueError) as error:  # no such file, or no text
        parser.error(str(error))
    try:
        with make_queue(args.db, args.workers) as queue:
            errors = fetch_all(queue, urls, args.again)
    except KeyboardInterrupt:
        print("Stopped. Run it again to go on.", file=sys.stderr)
        return 130
    except TaskxError as error:  # such as a file that is no database
        parser.error(str(error))
    for error in errors:
        print(error, file=sys.stderr)
    print(f"{len(urls)} URLs, {len(errors)} failed")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
