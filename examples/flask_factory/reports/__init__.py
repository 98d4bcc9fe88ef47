"""Reports: a Flask package with an application factory.

In the folder ``examples/flask_factory``::

    flask --app 'reports:create_app()' run --debug
    gunicorn --workers 2 'reports:create_app()'
    flask --app 'reports:create_app()' taskx worker     # with FLASK_TASKX_EMBEDDED=false for the site
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import Flask

from reports.tasks import taskx
from reports.views import views


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Make an app. Each app has its own queue."""
    app = Flask(__name__)
    app.config["TASKX_REPOSITORY"] = "sqlite:///reports.db"
    app.config["CURRENCY"] = "EUR"
    app.config.from_prefixed_env()
    app.config.update(config or {})
    taskx.init_app(app)
    app.register_blueprint(views)
    return app
