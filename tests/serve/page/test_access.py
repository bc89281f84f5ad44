"""Who can use the page: with a key, by keyboard, with a screen reader, on a phone; and what the server sends."""

import re

import pytest


class TestAccess:
    def test_a_key_is_asked_for_and_kept(self, opened, serving, models):
        with serving("-m", models / "talker.gguf", "--api-key", "secret") as address:
            talk = opened(address=address, wait=False)
            page = talk.page
            page.get_by_role("alert").get_by_text("API key").wait_for()
            assert page.get_by_label("API key").evaluate("one => one === document.activeElement")
            page.keyboard.type("secret")
            page.keyboard.press("Tab")
            talk.ready()
            page.keyboard.press("Escape")
            talk.say("Hello")
            talk.answered(2)
            page.reload()
            talk.ready()
            talk.problems.clear()  # the refused requests

    def test_by_keyboard_and_with_a_screen_reader(self, opened):
        talk = opened("talker")
        page = talk.page
        assert page.evaluate("document.activeElement.id") == "input"
        page.get_by_role("link", name="Skip to the input").press("Enter")
        page.keyboard.type("One")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        page.keyboard.press("Enter")
        answer = talk.answered(2)
        assert talk.bodies()[-1]["messages"] == [{"role": "user", "content": "One\ntwo"}]
        assert page.evaluate("document.activeElement.id") == "input"
        assert page.get_by_role("status").inner_text().startswith("Answer: Here **it** is")
        assert page.get_by_role("log").count() == 1
        answer.locator("summary").focus()
        page.keyboard.press("Enter")
        assert answer.locator("details").evaluate("one => one.open")
        page.get_by_role("button", name="Edit the answer").press("Enter")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Edit the message"
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Edit the answer"
        page.get_by_role("button", name="Settings").press("Enter")
        nameless = page.evaluate(
            """() => [...document.querySelectorAll(
                "button, select, input, textarea, summary, a, nav, aside, dialog, section")]
                .filter((one) => !(one.textContent.trim() || one.getAttribute("aria-label") || one.labels?.length
                                   || one.getAttribute("aria-labelledby"))).map((one) => one.outerHTML)"""
        )
        assert nameless == []
        assert page.get_by_role("dialog", name="Settings").count() == 1
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "settings-open"

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_texts_have_contrast(self, opened, scheme):
        """At least 4.5 between every text and what is behind it (WCAG 2.2, level AA)."""
        talk = opened("talker", color_scheme=scheme)
        page = talk.page
        talk.say("Hello")
        talk.answered(2)
        page.get_by_role("button", name="Settings").click()
        page.mouse.move(0, 0)
        low = page.evaluate(
            """() => {
                const parts = (color) => color.match(/[\\d.]+/g).map(Number);
                const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
                    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
                    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
                const behind = (node) => {
                    for (; node; node = node.parentElement) {
                        const [r, g, b, a = 1] = parts(getComputedStyle(node).backgroundColor);
                        if (a === 1) return [r, g, b];
                    }
                    return null;
                };
                const low = [];
                for (const node of document.querySelectorAll("body *")) {
                    const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
                    if (!own || !node.checkVisibility() || node.disabled) continue;
                    const pair = [light(parts(getComputedStyle(node).color)), light(behind(node))];
                    const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
                    if (contrast < 4.5) low.push(node.outerHTML.slice(0, 80));
                }
                return low;
            }"""
        )
        assert low == []

    def test_colours_can_be_chosen(self, opened):
        talk = opened("talker", color_scheme="light")
        page = talk.page
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Colours").select_option("dark")
        assert page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"
        page.reload()
        talk.ready()
        assert page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"

    def test_on_a_phone(self, opened):
        phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
        talk = opened("talker", **phone)
        page = talk.page
        page.get_by_label("Message", exact=True).fill("A" * 300)
        page.get_by_role("button", name="Send").tap()
        talk.answered(2)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert not page.get_by_role("button", name="New chat").is_visible()
        page.get_by_role("button", name="Show the list of conversations").tap()
        page.get_by_role("button", name="New chat").tap()
        assert not page.get_by_role("button", name="New chat").is_visible()
        assert page.locator(".message").count() == 0
        assert page.get_by_role("button", name="Send").bounding_box()["height"] >= 40


def test_what_the_server_sends(server):
    """The policy is on every part, whatever a client says that it accepts."""
    from urllib.request import Request, urlopen

    from engine.serve.page import FOLDER, POLICY, TYPES

    assert set(TYPES) == {path.name for path in FOLDER.iterdir() if path.suffix != ".py" and path.is_file()}
    for name in TYPES:
        path = "/" if name == "index.html" else f"/static/{name}"
        for headers in ({}, {"Accept": "text/html"}, {"Accept": "*/*"}):
            with urlopen(Request(server + path, headers=headers), timeout=30) as answer:
                assert answer.headers["Content-Security-Policy"] == POLICY
                assert answer.headers["Content-Type"] == TYPES[name]
                assert answer.read() == (FOLDER / name).read_bytes()


def test_the_page_names_no_other_host():
    from engine.serve.page import FOLDER, TYPES

    for name in TYPES:
        text = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(?<![\w?])https?://\w", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
