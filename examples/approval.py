"""A Flask page for refunds: each one waits for a yes, for up to three days, and holds no thread meanwhile.

Run it, ask for a refund, and answer. Stop it in between, and start it again: the refund still waits::

    flask --app examples/approval.py run

Somebody may also answer in a terminal, from another program, or on the dashboard at /taskx::

    flask --app examples/approval.py taskx answers
    flask --app examples/approval.py taskx finish ID/approval '"yes"'

On a site of yours, only those may see the page and the dashboard who may say yes.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from flask import Flask, Response, abort, redirect, render_template_string, request

from taskx import ConfigurationError, Context, PayloadError, TaskNotFound
from taskx.contrib.flask import Taskx

taskx = Taskx()


@taskx.executor("refund", version=1)
def refund(ctx: Context, order: int, euros: int) -> str:
    """Ask somebody, and pay.

    After each wait it begins anew: what must not happen twice is in a step, or in ``once``.
    """
    letter = ctx.step("letter", write_letter, order, euros)
    question = {"order": order, "euros": euros, "letter": letter}
    try:
        answer = ctx.ask("approval", question, timeout=timedelta(days=3), tags=["refunds"])
    except TimeoutError:
        return "nobody has answered in three days"
    if answer != "yes":
        return "refused"
    # If this process dies while it pays, nobody knows if it has: then a person is asked, too.
    return ctx.once("pay", pay, order, euros, key=ctx.key("pay"))


def write_letter(order: int, euros: int) -> str:
    """Return a letter, as a slow service would."""
    return f"We are sorry about order {order}, and pay {euros} euros back."


def pay(order: int, euros: int, key: str) -> str:
    """Stand for a bank. It gets the same key if the call is repeated."""
    logging.getLogger("bank").info("order %d: %d euros, with the key %s", order, euros, key)
    return f"paid {euros} euros"


@taskx.dashboard_check
def check_dashboard() -> bool:
    """Let everybody on this machine see the dashboard: replace it by your login."""
    return request.remote_addr == "127.0.0.1"


def create_app(**config: Any) -> Flask:
    """Make the app. Its queue starts with the first request."""
    app = Flask(__name__)
    app.config.update(TASKX_REPOSITORY="sqlite:///refunds.db", TASKX_DASHBOARD_URL="/taskx")
    app.config.from_prefixed_env()
    app.config.update(config)
    taskx.init_app(app)

    @app.errorhandler(ConfigurationError)  # an id that is too long
    @app.errorhandler(PayloadError)  # a number that is too large
    def refuse(error: Exception) -> tuple[str, int]:
        return str(error), 400

    @app.before_request
    def refuse_other_sites() -> None:
        """Refuse a form on a page of another site: browsers say where a form comes from."""
        site = request.headers.get("Sec-Fetch-Site", "same-origin")
        if request.method == "POST" and site != "same-origin":
            abort(403)

    @app.get("/")
    def show() -> str:
        """Show the newest refunds. Those that wait have two buttons."""
        refunds = taskx.queue.list_tasks(type="refund", limit=50).tasks
        open_answers = taskx.queue.list_tasks(type="answer", status="pending", tag="refunds").tasks
        answers = {answer.id.removesuffix("/approval"): answer for answer in open_answers}
        return render_template_string(PAGE, refunds=refunds, answers=answers)

    @app.post("/refunds")
    def ask() -> Response:
        """Submit a refund. One that was submitted for this order is not submitted again."""
        order, euros = (request.form.get(name, type=int) for name in ("order", "euros"))
        if order is None or euros is None or euros < 1:
            abort(400, "order and euros must be whole numbers")
        unique = refund.using(
            unique_key=f"refund of {order}", unique_scope="ever", on_conflict="return"
        )
        unique.submit(order=order, euros=euros)
        return redirect("/", code=303)

    @app.post("/refunds/<task_id>")
    def answer(task_id: str) -> Response:
        """Say yes or no. Only the first answer counts."""
        try:
            taskx.queue.finish(f"{task_id}/approval", request.form["answer"], by="the office")
        except TaskNotFound:
            abort(404)
        return redirect("/", code=303)

    return app


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Refunds</title>
<h1>Refunds</h1>
<form method="post" action="/refunds">
  <label>Order <input name="order" type="number" required></label>
  <label>Euros <input name="euros" type="number" min="1" required></label>
  <button>Ask for a refund</button>
</form>
<ul>
{% for refund in refunds %}
<li>order {{ refund.params.order }}, {{ refund.params.euros }} euros:
{% set asked = answers.get(refund.id) %}
{% if asked %}
  {{ asked.params.question.letter }} (until {{ asked.expires_at.strftime("%d %B, %H:%M UTC") }})
  <form method="post" action="/refunds/{{ refund.id }}">
    <button name="answer" value="yes">Yes</button> <button name="answer" value="no">No</button>
  </form>
{% else %}
  {{ refund.result or refund.error or refund.status }}
{% endif %}</li>
{% endfor %}
</ul>
<p><a href="/">Refresh</a> · <a href="/taskx/answers">Dashboard</a></p>
</html>
"""
