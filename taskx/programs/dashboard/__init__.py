"""A dashboard for a queue: one WSGI app, to be mounted in a program or served alone.

It holds no rules about tasks: it calls public methods of :class:`taskx.Queue`. It needs the packages
werkzeug and Jinja2.
"""

try:
    import jinja2 as _jinja2
    import werkzeug as _werkzeug
except ImportError as _error:
    raise ImportError(
        f"the dashboard needs the package {_error.name}: pip install 'taskx-queue[dashboard]'",
        name=_error.name,
    ) from _error

from taskx.programs.dashboard.app import Dashboard
from taskx.programs.dashboard.security import ALL, PERMISSIONS
from taskx.programs.dashboard.serving import serve

del _jinja2, _werkzeug

__all__ = ["ALL", "PERMISSIONS", "Dashboard", "serve"]
