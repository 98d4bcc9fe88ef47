"""Make the pictures of the dashboard in docs/images, with a headless Chromium.

    python tools/screenshots.py

The pictures show a small queue with tasks of every kind. They have few colours, so that they are small.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from taskx import Queue, SQLiteRepository, Task, chain, group
from taskx.programs.dashboard import Dashboard
from taskx.programs.dashboard.serving import bind

FOLDER = Path(__file__).parent.parent / "docs" / "images"
#: The pictures: their names, their paths, and options of the browser.
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "overview": ("/", {}),
    "task": ("/task?id={failed}", {"viewport": {"width": 1000, "height": 440}}),
    "failures": ("/failures", {"color_scheme": "dark"}),
    "flow": ("/flows/one?id={flow}", {}),
    "phone": ("/types", {"viewport": {"width": 360, "height": 640}, "locale": "zh-CN"}),
}
#: An executor that fails, in a file that the pictures name.
EMAIL = """
def email(to: str) -> None:
    if to.startswith("b"):
        raise ConnectionError(f"the server of {to} does not answer")
"""
_SIZE = {"width": 1000, "height": 640}
#: Most bytes of a picture.
MOST = 60_000


def fill(queue: Queue, gate: threading.Event) -> dict[str, str]:
    """Register executors and store tasks; return the values for the paths of the pictures."""

    @queue.executor("thumbnail", max_concurrency=4)
    def thumbnail(n: int) -> str:
        return f"{n}.png"

    shop: dict[str, Any] = {}
    exec(compile(EMAIL, "/srv/shop/tasks.py", "exec"), shop)
    queue.executor("email", rate="1000/m")(shop["email"])

    @queue.executor("report")
    def report() -> None:
        gate.wait()

    queue.start()
    for n in range(150):
        queue.submit("thumbnail", {"n": n}).result(60)
    failed = [
        queue.submit("email", {"to": f"{name}@example.com"}) for name in ("ann", "bob", "bea")
    ]
    for handle in failed:
        handle.exception(60)
    shrink = group(*(Task(type="thumbnail", params={"n": n}) for n in range(3)))
    flow = queue.submit_flow(
        chain(Task(type="thumbnail", params={"n": 0}), shrink, Task(type="report"))
    )
    queue.submit("email", {"to": "cleo@example.com"}, delay=7200)
    queue.schedule("nightly", "30 2 * * *", "report", tz="Europe/Berlin")
    return {"failed": failed[1].id, "flow": flow.id}


def main() -> None:
    program = shutil.which("chromium")
    if program is None:
        sys.exit("Chromium is missing: install Debian's package chromium")
    FOLDER.mkdir(exist_ok=True)
    gate = threading.Event()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        queue = Queue(SQLiteRepository(Path(folder) / "tasks.db"))
        values = fill(queue, gate)
        server = bind(Dashboard(queue), port=0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name, (path, options) in PICTURES.items():
            page = browser.new_page(**{"viewport": _SIZE, **options})
            page.set_default_timeout(300_000)  # for a busy machine
            page.goto(f"http://127.0.0.1:{server.server_port}{path.format_map(values)}")
            picture = FOLDER / f"dashboard-{name}.png"
            page.screenshot(path=picture)
            size = picture.stat().st_size
            if size > MOST:
                sys.exit(f"{picture} has {size:,} bytes, more than {MOST:,}: show less")
            page.close()
        browser.close()
        server.shutdown()
        gate.set()
        queue.close()


if __name__ == "__main__":
    main()
