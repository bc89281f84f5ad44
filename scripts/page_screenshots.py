"""Make the pictures of the page in docs/page/: light, dark, a text, and on a phone. Needs playwright and a Chromium.

    python scripts/page_screenshots.py

The answers are those of a model that says what it is told; the text is the bundled model's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from tests.support.models.scripted_model import scripted_llama  # noqa: E402
from tests.support.servers.browser import browser, require_browser  # noqa: E402 - found through the line above
from tests.support.servers.chat_page import TEMPLATE, Page, serving_at  # noqa: E402

TARGET = ROOT / "docs" / "page"
QUESTION = "How do I sort a list of people by age in Python?"
ANSWER = (
    "<think>",
    "The user asks for a sorted list;",
    " sorted() with a key is the plain way.",
    "</think>",
    "Python sorts with `sorted()`",
    "; it is **stable** and takes a key:\n\n",
    '```python\npeople = [("Ada", 36), ("Alan", 41)]\n',
    "for name, age in sorted(people, key=lambda one: one[1]):\n",
    '    print(f"{name} is {age}")\n```\n\n',
    "Two things to know:\n\n",
    "1. It returns a *new* list.\n",
    "2. `list.sort()` changes the list itself, and returns `None`.\n\n",
    "More in [the documentation](https://docs.python.org/3/howto/sorting.html).",
)
DESKTOP: dict[str, Any] = {"viewport": {"width": 960, "height": 700}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 640},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 1.5,
}


def chat(page: Any) -> None:
    """Ask the question, and go to the beginning of the answer."""
    page.say(QUESTION)
    page.answered(2)
    page.page.locator("#scroller").evaluate("one => (one.scrollTop = 0)")


def text(page: Any) -> None:
    """Have a story continued, always in the same way."""
    page.page.get_by_role("button", name="Settings").click()
    page.page.get_by_label("Seed").fill("4")
    page.page.get_by_label("Most tokens").fill("150")
    page.page.keyboard.press("Escape")
    page.page.locator("#text").fill("Once upon a time")
    page.page.keyboard.press("Control+Enter")
    page.page.get_by_role("button", name="Undo").wait_for()


def main() -> None:
    """Write the pictures."""
    TARGET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser(require_browser()) as chromium:
        model = scripted_llama(Path(folder) / "helper.gguf", ANSWER, template=TEMPLATE)
        with serving_at("-m", model) as address, serving_at() as tales:
            for name, server, act, options in (
                ("light", address, chat, {"color_scheme": "light", **DESKTOP}),
                ("dark", address, chat, {"color_scheme": "dark", **DESKTOP}),
                ("phone", address, chat, {"color_scheme": "light", **PHONE}),
                ("text", tales, text, {"color_scheme": "light", **DESKTOP}),
            ):
                page = Page(chromium, server, **options).open()
                act(page)
                page.page.screenshot(path=TARGET / f"{name}.png")


if __name__ == "__main__":
    main()
