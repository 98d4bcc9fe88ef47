"""What people do on the pages, with the mouse and with the keyboard alone."""

from __future__ import annotations

import json
from uuid import uuid4

import pytest
from helpers import eventually

from dashboard.browser.conftest import PATIENCE, expect
from taskx import Queue, RetryPolicy, SQLiteRepository, Task, chain


def notice(page, text):
    """Check that the last action has left this sentence, for the eye and for screen readers."""
    expect(page.locator(".notice")).to_have_text(text)
    eventually(lambda: page.evaluate("window.said") == text)  # at the end of the page


# --- types


def test_a_type_is_paused_and_resumed(site, page):
    page.goto("/types")
    page.get_by_role("button", name="Pause quiet").click()
    notice(page, "Type quiet is paused.")
    assert "quiet" in site.queue.paused
    page.get_by_role("button", name="Resume quiet").click()
    notice(page, "Type quiet runs again.")
    assert not site.queue.paused


def test_limits_are_set_and_removed(site, page):
    page.goto("/types")
    page.get_by_role("link", name="quiet", exact=True).click()
    page.get_by_label("Most at once").fill("3")
    page.get_by_label("Rate of starts").fill("50/m")
    page.get_by_label("Scope").select_option("each node")
    page.get_by_role("button", name="Set", exact=True).click()
    notice(page, "Type quiet has new limits.")
    assert site.queue.tuned().types["quiet"].limits["max_concurrency"] == 3
    page.get_by_role("button", name="Remove what is set here").click()
    notice(page, "Type quiet has its own limits again.")
    assert not site.queue.tuned()


# --- schedules


def test_a_schedule_is_paused_triggered_filled_and_removed(site, page):
    name = "to be removed"
    site.queue.schedule(name, "0 * * * *", "quiet")
    page.goto("/schedules?q=removed")
    expect(page.get_by_role("rowheader")).to_contain_text(name)
    expect(page.get_by_text("hourly, at minute 0")).to_be_visible()
    page.get_by_role("button", name=f"Pause {name}").click()
    notice(page, f"Schedule {name} is paused.")
    page.get_by_role("button", name=f"Resume {name}").click()
    notice(page, f"Schedule {name} ticks again.")
    page.get_by_role("button", name=f"Run now {name}").click()
    expect(page.locator(".notice")).to_contain_text("was submitted.")
    page.get_by_text("Back-fill").click()
    page.get_by_label("From (UTC)").fill("2026-01-01T00:00")
    page.get_by_label("to (UTC)").fill("2026-01-01T02:00")
    page.get_by_role("button", name="Make the missing tasks").click()
    notice(page, "The span has 3 ticks, which have tasks now.")
    page.get_by_role("button", name=f"Remove {name}").click()
    expect(page.locator("h1")).to_have_text(f"Remove the schedule {name}?")
    page.get_by_role("link", name="No, go back").click()
    page.get_by_role("button", name=f"Remove {name}").click()
    page.get_by_role("button", name="Yes").click()
    notice(page, f"Schedule {name} was removed.")
    assert name not in site.queue.schedules()


# --- failures and flows


def test_a_group_of_failures_runs_again_at_a_rate(site, page):
    handles = [site.queue.submit("grouped") for _ in range(3)]
    for handle in handles:
        handle.exception(PATIENCE)
    page.goto("/failures")
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="grouped", exact=True))
    row.get_by_role("textbox").fill("1/d")
    row.get_by_role("button").click()
    expect(page.locator("h1")).to_have_text("Run all 3 failed tasks of this group again?")
    page.get_by_role("button", name="Yes").click()
    notice(page, "3 tasks run again.")
    assert site.queue.count_tasks(type="grouped", status="pending") >= 2


def test_the_failed_part_of_a_flow_runs_again(site, page):
    flow = site.queue.submit_flow(chain(Task(type="part"), Task(type="quiet")))
    page.goto(f"/flows/one?id={flow.id}")
    expect(page.locator("svg.flow a")).to_have_count(2)
    expect(page.locator(".status.failed")).to_be_visible()  # the page refreshes itself
    page.get_by_role("button", name="Run the failed part again").click()
    page.get_by_role("button", name="Yes").click()
    notice(page, "2 tasks run again.")


def test_a_box_of_a_flow_leads_to_its_task(site, page):
    page.goto("/flows")
    page.locator("tbody a").first.click()
    page.locator("svg.flow a").first.click()
    expect(page.locator("h1 code")).to_be_visible()
    assert "/task?id=" in page.url


# --- nodes


def test_a_node_is_tuned_asked_and_stopped(site, page):
    second = Queue(SQLiteRepository(site.queue.repository.path))
    second.executor("second")(lambda: None)
    with second:
        [node] = [node for node in second.nodes() if "second" in node.types]
        page.goto("/nodes")
        panel = page.get_by_role("row").filter(has_text=node.name)
        panel.get_by_role("button", name="Threads").click()
        expect(page.locator("pre").first).to_be_visible()
        page.get_by_role("link", name="Nodes", exact=True).first.click()
        panel.get_by_role("spinbutton").fill("9")
        panel.get_by_role("button", name=f"Set {node.name}").click()
        notice(page, "The number of workers is now 9.")
        panel.get_by_role("button", name=f"Stop {node.name}").click()
        page.get_by_role("button", name="Yes").click()
        notice(page, "The node was asked to stop.")
        expect(panel).to_have_count(0)  # the page refreshes itself
    site.queue.untune(workers=True, node=node.id)
    page.goto("/system")
    expect(page.get_by_role("cell", name="stop node").first).to_be_visible()


# --- tasks


def test_selected_tasks_are_cancelled_run_again_and_deleted(site, page):
    for _ in range(3):
        site.queue.submit("quiet", delay=3600, created_by="select")
    page.goto("/tasks?q=by:select")
    page.get_by_label("Select the page").check()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("h1")).to_have_text("Cancel 3 tasks?")
    page.get_by_role("button", name="Yes").click()
    notice(page, "3 tasks were cancelled.")
    page.get_by_label("all 3 that match, not only the selected ones").check()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("h1")).to_have_text("Delete 3 tasks?")
    page.get_by_role("button", name="Yes").click()
    notice(page, "3 tasks were deleted.")
    expect(page.get_by_text("No task matches.")).to_be_visible()


def test_a_filter_finds_tasks_and_explains_mistakes(site, page):
    page.goto("/tasks")
    field = page.get_by_role("combobox", name="Filter")
    field.fill("type:broken status:failed")
    field.press("Enter")
    expect(page.locator("tbody tr")).to_have_count(3)
    page.get_by_text("The same list elsewhere").click()
    expect(page.locator("pre", has_text="taskx list")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Export as JSON lines").click()
    lines = download.value.path().read_text().splitlines()
    assert {json.loads(line)["type"] for line in lines} == {"broken"}
    page.goto("/")
    page.goto("/tasks?q=")
    expect(page.locator("[aria-invalid]")).to_have_count(0)


def test_a_task_runs_again_with_other_params(site, page):
    page.goto(f"/task?id={site.failed}")
    expect(page.locator("pre").filter(has_text="in broken").first).to_be_visible()
    page.get_by_text("Change the params and run again").click()
    page.get_by_label("Params as JSON").fill('{"why": "another reason"}')
    page.get_by_role("button", name="Run again with these params").click()
    expect(page.locator(".notice")).to_be_visible()
    expect(page.get_by_text("another reason").first).to_be_visible()


def test_a_single_task_is_cancelled_after_a_question(site, page):
    handle = site.queue.submit("quiet", delay=3600)
    page.goto(f"/task?id={handle.id}")
    with page.expect_event("dialog"):
        page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".notice")).to_be_visible()
    assert handle.task().status == "cancelled"


# --- the keyboard


def test_the_keyboard_leads_everywhere(page):
    page.goto("/")
    letters = {"t": "Tasks", "f": "Failures", "w": "Flows", "s": "Schedules"}
    for letter, title in {
        **letters,
        "y": "Types",
        "n": "Nodes",
        "m": "System",
        "o": "Overview",
    }.items():
        page.keyboard.press("g")
        page.keyboard.press(letter)
        expect(page.locator("h1")).to_have_text(title)
        # The script of the page shows this button. Before that it hears no key.
        expect(page.get_by_role("button", name="Keyboard")).to_be_visible()


def test_slash_searches_and_the_question_mark_helps(page):
    page.goto("/tasks")
    page.keyboard.press("/")
    field = page.get_by_role("combobox", name="Filter")
    expect(field).to_be_focused()
    page.keyboard.type("status:cancelled g?")  # no shortcut while one types
    expect(field).to_have_value("status:cancelled g?")
    page.goto("/nodes")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.get_by_role("button", name="Keyboard").click()
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("/")  # a page without a search goes to the tasks
    expect(page.locator("h1")).to_have_text("Tasks")


def test_the_first_tab_skips_the_navigation(page):
    page.goto("/tasks")
    page.keyboard.press("Tab")
    link = page.get_by_role("link", name="Skip to the content")
    expect(link).to_be_focused()
    expect(link).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()


def test_the_focus_is_visible_on_every_element(site, page):
    page.goto("/types/one?type=mail")
    for _ in range(40):
        page.keyboard.press("Tab")
        at = page.evaluate(
            """() => {
                const at = document.activeElement, style = getComputedStyle(at);
                return [at.tagName, at.outerHTML.slice(0, 99), style.outlineStyle, style.outlineWidth];
            }"""
        )
        if at[0] == "BODY":
            break
        assert at[2:] == ["solid", "3px"], at


def test_a_task_is_cancelled_with_the_keyboard_alone(site, page):
    handle = site.queue.submit("quiet", delay=3600, created_by="keys")
    page.goto("/tasks?q=by:keys")
    page.keyboard.press("j")
    expect(page.locator("tbody a.item")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    expect(page.get_by_label(f"Select {handle.id}")).to_be_checked()
    page.get_by_role("button", name="Cancel").focus()
    page.keyboard.press("Enter")
    yes = page.get_by_role("button", name="Yes")
    expect(yes).to_be_focused()
    page.keyboard.press("Enter")
    notice(page, "1 task was cancelled.")
    assert handle.task().status == "cancelled"


# --- live


def test_a_page_shows_changes_by_itself_and_announces_them(site, page):
    page.goto("/tasks?q=by:live")
    expect(page.get_by_text("No task matches.")).to_be_visible()
    expect(page.locator("#state")).to_have_text("live")
    handle = site.queue.submit("quiet", delay=3600, created_by="live")
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page.locator("#live")).to_have_text("1 task")
    site.queue.cancel_task(handle.id)
    expect(page.locator(".status.cancelled")).to_be_visible()


def test_what_one_has_opened_stays_open(site, page):
    page.goto("/tasks?q=by:open")
    page.get_by_text("Fields of the filter").click()
    site.queue.submit("quiet", delay=3600, created_by="open")
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page.locator("details#fields")).to_have_attribute("open", "")


@pytest.fixture
def listed(site, page):
    """Open a list of one waiting task. Return its box, and a function that adds a task to the list."""
    by = uuid4().hex

    def add():
        return site.queue.submit("quiet", delay=3600, created_by=by).id

    box = page.get_by_label(f"Select {add()}")
    page.goto(f"/tasks?q=by:{by}")
    return box, add


def test_a_page_refreshes_again_after_a_tick_was_taken_back(page, listed):
    box, add = listed
    box.check()
    box.uncheck()
    expect(box).to_be_focused()  # a click leaves the focus on the box
    add()
    expect(page.locator("tbody tr")).to_have_count(2)


def test_a_page_refreshes_again_after_all_ticks_were_taken_back(page, listed):
    _, add = listed
    page.get_by_label("Select the page").check()
    page.get_by_label("Select the page").uncheck()
    add()
    expect(page.locator("tbody tr")).to_have_count(2)


def test_a_page_refreshes_while_its_search_has_the_focus_and_nothing_is_entered(page, listed):
    _, add = listed
    page.keyboard.press("/")
    for entered in ("by:", ""):
        page.get_by_role("combobox", name="Filter").fill(entered)
    add()
    expect(page.locator("tbody tr")).to_have_count(2)
    expect(page.get_by_role("combobox", name="Filter")).to_be_focused()
    expect(page.get_by_role("combobox", name="Filter")).to_have_value("")


def test_a_page_refreshes_again_after_fields_have_their_values_again(site, page):
    page.goto("/types/one?type=quiet")
    page.get_by_label("Most at once").fill("3")
    page.get_by_label("Scope").select_option("each node")
    page.get_by_label("Most at once").fill("")
    page.get_by_label("Scope").select_option("")
    page.get_by_label("Most at once").blur()
    site.queue.pause("quiet")
    expect(page.get_by_role("button", name="Resume quiet")).to_be_visible()
    site.queue.resume("quiet")
    expect(page.get_by_role("button", name="Pause quiet")).to_be_visible()


def enter(page, name, value):
    page.get_by_label(name).fill(value)
    page.get_by_label(name).blur()


BEGUN = {
    "a tick": ("/tasks?q=type:quiet", lambda page: page.get_by_label("Select the page").check()),
    "a search": ("/types", lambda page: enter(page, "Name", "qui")),
    "a field": ("/types/one?type=quiet", lambda page: enter(page, "Most at once", "3")),
    "a choice": (
        "/types/one?type=quiet",
        lambda page: page.get_by_label("Scope").select_option("each node"),
    ),
    "the focus": ("/types/one?type=quiet", lambda page: page.get_by_label("Burst").focus()),
    "the focus of the keyboard on a box": (
        "/tasks?q=type:quiet",
        lambda page: [page.keyboard.press(key) for key in ("j", "Shift+Tab")],
    ),
}


@pytest.mark.parametrize("begun", BEGUN)
def test_a_page_does_not_refresh_while_something_is_begun(site, page, begun):
    path, begin = BEGUN[begun]
    site.queue.submit("quiet", delay=3600)
    page.clock.install(time=0)
    page.clock.pause_at(1_000)  # the timers of the page wait for run_for()
    page.goto(path)
    asked = []
    page.on("request", lambda request: asked.append("taskx-refresh" in request.headers))
    begin(page)
    page.clock.run_for(10_000)
    assert True not in asked
    expect(page.locator("#state")).to_contain_text("paused: ")
    page.goto(path)
    with page.expect_request(lambda request: "taskx-refresh" in request.headers):
        page.clock.run_for(2_000)


def test_an_answer_that_comes_after_a_tick_is_not_merged(page, listed):
    """Its rows have other places, and the tick would go to another task."""
    box, add = listed
    held = []
    page.route("**/tasks?*", lambda route: held.append(route))
    with page.expect_request("**/tasks?*"):
        add()
    box.check()
    with page.expect_event("requestfinished"):
        held[0].continue_()
    page.unroute("**/tasks?*")
    page.evaluate("new Promise((done) => setTimeout(done))")
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(box).to_be_checked()
    box.uncheck()
    expect(page.locator("tbody tr")).to_have_count(2)  # the answer was not taken as seen either


def test_a_page_that_is_paused_goes_on_by_itself_or_by_its_button(site, page, listed):
    box, add = listed
    box.check()
    add()
    expect(page.locator("#state")).to_have_text("paused: a row is ticked")
    page.locator("#state").click()
    expect(box).not_to_be_checked()
    expect(page.locator("tbody tr")).to_have_count(2)
    expect(page.locator("#state")).to_have_text("live")
    page.clock.install()
    page.goto("/types/one?type=quiet")
    page.get_by_label("Burst").focus()
    page.keyboard.press("Shift")
    expect(page.locator("#state")).to_have_text("paused: something is entered")
    page.clock.fast_forward(60_000)  # nobody has entered anything since
    expect(page.locator("#state")).to_have_text("live")


def test_a_page_says_that_the_server_is_away_and_goes_on_when_it_is_back(visit):
    page, held = visit(fails=False), []
    page.clock.install(time=0)
    page.clock.pause_at(1_000)  # the timers of the page wait for run_for()
    page.goto("/tasks")
    state = page.locator("#state")
    expect(state).to_have_text("live")
    answers = (lambda route: route.fulfill(status=503)), (lambda route: held.append(route))
    for answer, seconds in zip(answers, (0, 30), strict=True):
        page.route("**/tasks*", answer)
        with page.expect_request("**/tasks*"):
            page.clock.run_for(2_000)
        page.clock.run_for(1000 * seconds)
        expect(state).to_have_text("disconnected")
        page.unroute("**/tasks*")
        page.clock.run_for(4_000)
        expect(state).to_have_text("live")


def test_the_attempts_of_a_task_have_their_numbers_and_a_line_each(site, page):
    type = f"thrice {uuid4()}"

    @site.queue.executor(type, retry=RetryPolicy(3, backoff="fixed", base=0.001))
    def thrice():
        raise ValueError("thrice")

    handle = site.queue.submit(type)
    handle.exception(PATIENCE)
    page.goto(f"/task?id={handle.id}")
    titles = page.get_by_role("heading", name="attempt ")
    expect(titles).to_have_text(["attempt 3 failed", "attempt 2 retried", "attempt 1 retried"])
    expect(page.locator(".lanes .label")).to_have_text(["attempt 1", "attempt 2", "attempt 3"])
    assert page.locator(".lanes rect").count() == 6
