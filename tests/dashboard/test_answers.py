"""The screen of answers, the form to give one, and what a waiting task's page says."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import timedelta
from html import unescape

import pytest

from taskx import Config, Task, Uncertain, answer, chain
from taskx.programs.dashboard import ALL
from taskx.testing import ManualQueue

HOSTILE = """<script>alert('"&')</script>"""


def text_of(response):
    """Return the text of a page, without its elements."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", response.text)).split())


@pytest.fixture
def queue():
    """A queue whose tasks ask, sleep, and are not sure."""
    queue = ManualQueue(config=Config(redact=("password",)))

    @queue.executor()
    def refund(ctx, order: int, days: float | None = None) -> str:
        question = {"order": order, "password": "hunter2", "text": HOSTILE}
        timeout = None if days is None else timedelta(days=days)
        return ctx.ask("approval", question, timeout=timeout, tags=["finance"])

    @queue.executor()
    def pay(ctx) -> str:
        def charge():
            if queue.unsure:
                raise Uncertain("no reply")
            return "paid now"

        return ctx.once("charge", charge)

    @queue.executor()
    def nap(ctx) -> None:
        ctx.sleep(timedelta(days=14), step="grace")

    @queue.executor()
    def ship(ctx) -> str:
        return ctx.wait("event/paid")

    queue.unsure = True
    return queue


@pytest.fixture
def ask(queue):
    """Return a function that submits a task and lets it park."""

    def ask(type, **params):
        handle = queue.submit(type, params)
        queue.run_all()
        return handle

    return ask


@pytest.fixture
def browser(look, queue):
    return look(queue)


def give(browser, answer_id, value="", kind="text", **more):
    """Send the form; return the page that follows."""
    form = {"id": answer_id, "value": value, "kind": kind, "back": "/answers", **more}
    response = browser.post("/answers/finish", data=form)
    assert (response.status_code, response.location) == (303, "/answers"), text_of(response)
    return browser.get("/answers")


class TestTheInbox:
    def test_it_says_that_nothing_waits(self, browser):
        assert "No task waits for a person." in text_of(browser.get("/answers"))

    def test_an_answer_is_shown_with_question_task_times_and_tags(self, browser, ask):
        handle = ask("refund", order=7, days=3)
        page = browser.get("/answers")
        words = text_of(page)
        assert "1 open answer" in words
        assert "approval refund" in words
        assert "order 7" in words
        assert re.search(r"asked \S+ ms ago · ends in 3 d", words)
        assert "finance" in words
        assert f"/task?id={handle.id}" in unescape(page.text)
        assert HOSTILE not in page.text

    def test_secrets_in_questions_are_redacted(self, browser, ask):
        ask("refund", order=7)
        page = browser.get("/answers")
        assert "hunter2" not in page.text
        assert "***" in page.text

    def test_a_question_needs_the_permission_to_see_params(self, look, queue, ask):
        ask("refund", order=77)
        words = text_of(look(queue, permissions={"read", "answer"}).get("/answers"))
        assert "approval" in words
        assert "You may not see params." in words
        assert "order" not in words

    def test_a_form_needs_the_permission_to_answer(self, look, queue, ask):
        ask("refund", order=7)
        page = look(queue, permissions=ALL - {"answer"}).get("/answers")
        assert "answers/finish" not in page.text
        assert "answers/finish" in look(queue, permissions={"read", "answer"}).get("/answers").text

    def test_answers_are_filtered_by_a_tag(self, browser, ask):
        ask("refund", order=7)
        ask("pay")
        assert "2 open answers" in text_of(browser.get("/answers"))
        assert "1 open answer " in text_of(browser.get("/answers?tag=finance"))

    def test_it_goes_on_on_the_next_page(self, browser, ask, monkeypatch):
        from taskx.programs.dashboard.screens import answers

        monkeypatch.setattr(answers, "ROWS", 1)
        for order in (1, 2):
            ask("refund", order=order)
        first = browser.get("/answers")
        (following,) = re.findall(r'href="([^"]*after=[^"]*)"', first.text)
        assert "order 2" in text_of(first)
        assert "order 1" in text_of(browser.get(unescape(following)))

    def test_an_answer_of_a_flow_has_its_name_and_waits_for_its_turn(self, browser, queue):
        draft = queue.executor("draft")(lambda: "text")
        flow = queue.submit_flow(chain(draft, answer("legal", "May we?"), draft))
        words = text_of(browser.get("/answers"))
        assert "legal" in words
        assert "May we?" in words
        assert "It cannot be given yet" in words
        queue.run_all()
        give(browser, flow.ids[1], "yes")
        queue.run_all()
        assert flow.result() == "text"

    def test_the_name_of_an_answer_in_a_flow_is_a_param(self, look, queue):
        draft = queue.executor("draft")(lambda: None)
        queue.submit_flow(chain(draft, answer("legal")))
        assert "legal" not in look(queue, permissions={"read"}).get("/answers").text

    def test_an_event_belongs_to_no_task(self, browser, queue, ask):
        handle = ask("ship")
        assert "paid an event" in text_of(browser.get("/answers"))
        give(browser, "event/paid", "cash")
        queue.run_all()
        assert handle.result() == "cash"

    def test_the_overview_counts_them_and_leads_to_them(self, browser, ask):
        assert "answers to give" not in browser.get("/").text
        ask("refund", order=7)
        page = browser.get("/")
        assert "1 wait for people" in text_of(page)
        assert re.search(r'class="card" href="/answers"|href="/answers" class="card', page.text)

    def test_it_is_there_in_chinese(self, browser, ask):
        ask("pay")
        words = text_of(browser.get("/answers", headers={"Accept-Language": "zh"}))
        assert "等待人工" in words
        assert "1 个待答复" in words
        assert "重新执行" in words
        assert "Answer" not in words


class TestAnswering:
    @pytest.mark.parametrize(
        ("value", "kind", "result"),
        [
            ("yes", "text", "yes"),
            ('{"ok": true}', "json", {"ok": True}),
            ("a\r\nb", "text", "a\nb"),
        ],
    )
    def test_an_answer_is_a_text_or_json(self, browser, queue, ask, value, kind, result):
        handle = ask("refund", order=7)
        assert "The answer was given." in text_of(
            give(browser, f"{handle.id}/approval", value, kind)
        )
        queue.run_all()
        assert handle.result() == result

    def test_an_answer_can_be_an_error(self, browser, queue, ask):
        handle = ask("refund", order=7)
        give(browser, f"{handle.id}/approval", "refused by Eva", "error")
        queue.run_all()
        assert "refused by Eva" in handle.task().error

    def test_a_call_with_an_unknown_outcome_can_be_made_again(self, browser, queue, ask):
        handle = ask("pay")
        words = text_of(browser.get("/answers"))
        assert "Nobody knows how “charge” has ended" in words
        queue.unsure = False
        give(browser, f"{handle.id}/charge", again="1")
        queue.run_all()
        assert handle.result() == "paid now"

    def test_its_outcome_can_be_given(self, browser, queue, ask):
        handle = ask("pay")
        give(browser, f"{handle.id}/charge", "rc_17")
        queue.run_all()
        assert handle.result() == "rc_17"

    def test_only_the_first_answer_counts(self, browser, queue, ask):
        handle = ask("refund", order=7)
        give(browser, f"{handle.id}/approval", "yes")
        words = text_of(give(browser, f"{handle.id}/approval", "no"))
        assert "Nothing was done: the answer was given before" in words
        queue.run_all()
        assert handle.result() == "yes"

    @pytest.mark.parametrize(
        ("value", "kind", "words"),
        [(" ", "text", "The answer is empty."), ("{", "json", "The answer is not JSON:")],
    )
    def test_what_is_no_answer_is_refused(self, browser, ask, value, kind, words):
        handle = ask("refund", order=7)
        form = {"id": f"{handle.id}/approval", "value": value, "kind": kind}
        response = browser.post("/answers/finish", data=form)
        assert response.status_code == 400
        assert words in text_of(response)
        assert "1 open answer" in text_of(browser.get("/answers"))

    def test_who_has_given_it_is_noted(self, look, queue, ask):
        handle = ask("refund", order=7)
        inside = look(queue, users={"eva": "a long password"})
        form = {"id": f"{handle.id}/approval", "value": "yes", "kind": "text"}
        inside.post("/answers/finish", data=form, auth=("eva", "a long password"))
        assert queue.get_task_status(f"{handle.id}/approval").worker == "eva"
        assert [(c.by, c.action) for c in queue.changes()] == [("eva", "finish")]


class TestThePageOfATask:
    def test_a_waiting_task_says_for_what_and_can_be_answered_there(self, browser, queue, ask):
        handle = ask("refund", order=7, days=3)
        page = browser.get(f"/task?id={handle.id}")
        words = text_of(page)
        assert re.search(
            r"It waits for the answer \S+/approval since \d{4}-.*, until \d{4}-", words
        )
        assert f'<a href="/task?id={handle.id}/approval">' in page.text
        assert "asks: approval" in words
        assert "Expires" not in words
        assert 'action="/answers/finish"' in page.text

    def test_an_answer_has_its_form(self, browser, ask):
        handle = ask("refund", order=7)
        page = browser.get("/task", query_string={"id": f"{handle.id}/approval"})
        assert "It waits for somebody to call queue.finish(" in text_of(page)
        assert 'action="/answers/finish"' in page.text

    def test_a_task_that_sleeps_says_until_when(self, browser, ask):
        handle = ask("nap")
        words = text_of(browser.get(f"/task?id={handle.id}"))
        assert "It sleeps in step 'grace' since" in words
        assert re.search(r"sleeps: grace .* Checkpoints grace waits until \d\d-\d\d", words)

    def test_a_task_that_does_not_wait_says_nothing_of_it(self, browser, queue):
        for handle in (queue.submit("nap"), queue.submit("refund", {"order": 1}, delay=60)):
            assert "It waits for" not in text_of(browser.get(f"/task?id={handle.id}"))

    def test_its_steps_are_told_in_words(self, look, queue):
        @queue.executor("late")
        def late(ctx):
            with suppress(TimeoutError):
                ctx.ask("approval", timeout=60)
            ctx.once("charge", charge)

        def charge():
            raise Uncertain("no reply")

        handle = queue.submit("late")
        queue.run_all()
        queue.advance(61)
        queue.run_all()
        words = text_of(look(queue).get(f"/task?id={handle.id}"))
        assert re.search(r"approval TimeoutError: no answer to \S+/approval", words)
        assert "charge has begun, and nobody knows how it has ended" in words

    def test_a_task_that_waits_for_children_leads_to_them(self, look, queue):
        @queue.executor("crawl")
        def crawl(ctx):
            return ctx.run_all("pages", [Task(type="page")] * 3)

        queue.declare("page")
        handle = queue.submit("crawl")
        queue.run_all()
        words = text_of(look(queue).get(f"/task?id={handle.id}"))
        assert "children (pages)" in words
        assert "children: pages" in words
        assert words.count("– page") == 3
