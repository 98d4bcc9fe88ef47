"""What a task emits, on its page."""

from __future__ import annotations

import threading

from helpers import PATIENCE, eventually

from dashboard.browser.conftest import expect
from taskx import Retry
from taskx.programs.dashboard import streaming


def test_a_page_goes_on_where_its_connection_was_cut_off(site, page, monkeypatch):
    monkeypatch.setattr(streaming, "EVENTS_WITHIN", 0.0)  # each connection ends at once
    gates, requests = [threading.Event() for _ in range(3)], []

    @site.queue.executor("speak", max_attempts=2)
    def speak(ctx):
        if ctx.task.attempt == 1:
            ctx.emit("wrong")
            assert gates[0].wait(PATIENCE)
            raise Retry(0)
        for word, gate in zip(("one ", "two "), gates[1:], strict=True):
            ctx.emit(word)
            assert gate.wait(PATIENCE)
        ctx.emit("three")

    page.on("request", lambda request: requests.append(request.url))
    handle = site.queue.submit("speak")
    page.goto(f"/task?id={handle.id}")
    shown = page.locator("[data-stream] pre")
    for text, gate in zip(("wrong", "one ", "one two "), gates, strict=True):
        expect(shown).to_have_text(text, use_inner_text=False)
        before = len(requests)
        eventually(
            lambda before=before: (
                page.wait_for_timeout(50) or any("/stream" in url for url in requests[before:])
            )
        )
        gate.set()
    expect(shown).to_have_text("one two three")
    handle.result(PATIENCE)
