"""Fixtures for tests of the dashboard: browsers without a window, as clients of its WSGI app."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from werkzeug.test import Client, TestResponse

from taskx.programs.dashboard import ALL, Dashboard

#: The header by which a browser of today says that a form is on a page of the same site.
SAME = {"Sec-Fetch-Site": "same-origin"}


class Browser(Client):
    """A browser of today that looks at a dashboard."""

    def open(self, *args: Any, headers: Any = None, **options: Any) -> TestResponse:
        return super().open(*args, headers={**SAME, **(headers or {})}, **options)


@pytest.fixture
def look(make_queue: Callable[..., Any]) -> Callable[..., Browser]:
    """Return a function that opens a browser on a queue's dashboard; all is permitted by default."""

    def opened(queue: Any = None, **options: Any) -> Browser:
        queue = queue or make_queue()
        if not {"users", "permissions"} & {*options}:
            options["permissions"] = ALL
        return Browser(Dashboard(queue, **options))

    return opened
