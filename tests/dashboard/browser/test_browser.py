from playwright.sync_api import expect


def test_a(page):
    page.goto("/")
    expect(page.locator("h1")).to_have_text("Overview")
