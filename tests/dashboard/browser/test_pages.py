"""Every page in a real browser: no errors, hostile texts, phones, themes, languages, no scripts."""

from __future__ import annotations

from urllib.parse import quote

from dashboard.browser.conftest import HOSTILE, expect
from taskx.programs.dashboard.terms import term

SCREENS = ["overview", "tasks", "failures", "flows", "schedules", "types", "nodes", "system"]


def pages(site):
    """Return the paths of all pages, by a name for each."""
    queue = site.queue
    hostile = quote(HOSTILE, safe="")
    found = {name: f"/{name}" for name in SCREENS}
    found["overview"] = "/"
    found["task"] = f"/task?id={quote(site.failed)}"
    found["hostile task"] = f"/task?id={quote('id ' + HOSTILE, safe='')}"
    found["running task"] = f"/task?id={next(queue.iter_tasks(type='hold')).id}"
    found["type"] = "/types/one?type=mail"
    found["hostile type"] = f"/types/one?type={hostile}"
    found["filter"] = f"/tasks?q={quote(term('by', HOSTILE), safe='')}"
    found["flow"] = f"/flows/one?id={queue.flows()[0].id}"
    return found


def check(page):
    """Check that a page is whole, and that no hostile text has become an element."""
    expect(page.locator("h1")).to_be_visible()
    expect(page.locator("main")).to_have_count(1)
    assert page.locator("img, main script, main style, main [style], iframe").count() == 0
    assert page.title() != "broken"
    assert "699993" not in page.content()  # 77777 * 9


def check_labels(page):
    """Check that everything has a name for screen readers, and that no id is there twice."""
    for landmark in ("banner", "main"):
        assert page.get_by_role(landmark).count() == 1
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button, a, svg")].filter(
            (at) => at.type !== "hidden" && !at.labels?.length && !at.getAttribute("aria-label")
                && !at.getAttribute("aria-labelledby") && !at.textContent.trim()
        ).map((at) => at.outerHTML)"""
    )
    assert unnamed == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((at) => at.id)")
    assert len(ids) == len(set(ids))


def check_width(page, width):
    """Check that nothing but the tables in their frames is wider than the window."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_no_page_has_errors(site, page):
    for path in pages(site).values():
        page.goto(path)
        check(page)
        check_labels(page)
        check_width(page, 1280)


def test_pages_fit_a_phone_and_speak_chinese(site, visit):
    page = visit(viewport={"width": 320, "height": 640}, locale="zh-CN")
    for path in pages(site).values():
        page.goto(path)
        check(page)
        check_width(page, 320)
        assert page.locator("html").get_attribute("lang") == "zh"


def test_hostile_texts_are_shown_as_they_are(site, page):
    page.goto(pages(site)["hostile task"])
    expect(page.locator("h1")).to_contain_text(HOSTILE[:40])
    expect(page.locator("#params")).to_be_visible()
    for name in ("failures", "schedules", "types", "filter"):
        page.goto(pages(site)[name])
        expect(page.locator("main").get_by_text(HOSTILE[:40]).first).to_be_visible()
    expect(page.get_by_role("table").get_by_text(HOSTILE[:40]).first).to_be_visible()


def test_buttons_are_large_enough_for_fingers(site, visit):
    page = visit(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    page.goto("/types")
    for button in page.get_by_role("button").all():
        box = button.bounding_box()
        assert box is None or box["height"] >= 40


def test_pages_work_without_scripts(site, visit):
    page = visit(java_script_enabled=False)
    for path in pages(site).values():
        page.goto(path)
        check(page)
    page.goto("/types/one?type=quiet")
    page.get_by_role("button", name="Pause quiet").click()
    expect(page.locator(".notice")).to_have_text("Type quiet is paused.")
    page.get_by_role("button", name="Resume quiet").click()
    expect(page.locator(".notice")).to_have_text("Type quiet runs again.")
    assert "quiet" not in site.queue.paused


def test_a_change_of_many_tasks_without_scripts(site, visit):
    ids = [site.queue.submit("mail", delay=3600, created_by="no scripts").id for _ in range(3)]
    page = visit(java_script_enabled=False)
    page.goto("/tasks?q=by:%22no scripts%22")
    page.get_by_label(f"Select {ids[0]}").check()
    page.get_by_label(f"Select {ids[1]}").check()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("h1")).to_have_text("Cancel 2 tasks?")
    page.get_by_role("button", name="Yes").click()
    expect(page.locator(".notice")).to_have_text("2 tasks were cancelled.")
    assert site.queue.count_tasks(created_by="no scripts", status="cancelled") == 2


def test_the_colours_follow_the_system(visit):
    grounds = []
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        page.goto("/")
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(245, 246, 248)", "rgb(14, 17, 22)"]


def test_motion_is_reduced_on_demand(visit):
    times = []
    for motion in ("no-preference", "reduce"):
        page = visit(reduced_motion=motion)
        page.goto("/")
        times.append(
            page.evaluate("getComputedStyle(document.querySelector('a')).transitionDuration")
        )
    assert times[0] != times[1] == "0s"


def test_the_language_follows_the_browser_and_can_be_chosen(visit):
    page = visit(locale="zh-CN")
    page.goto("/schedules")
    expect(page.locator("h1")).to_have_text("定时计划")
    page.get_by_role("button", name="English").click()
    expect(page.locator("h1")).to_have_text("Schedules")
    page.get_by_role("link", name="Types", exact=True).click()
    expect(page.locator("h1")).to_have_text("Types")


def test_styles_and_scripts_that_are_not_ours_are_refused(site, visit):
    """This also shows that the tests hear what the browser refuses."""
    page = visit(fails=False)
    page.goto("/")
    with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        page.evaluate("document.body.setAttribute('style', 'color: red')")
    with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {text: '1'}))"
        )
