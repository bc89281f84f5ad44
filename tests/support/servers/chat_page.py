"""Models that say what they are told, the real server, and the page as tests handle it."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from urllib.parse import urlsplit

from tests.support.models.scripted_model import scripted_llama

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{# <think> </think> #}"
)
CODE = 'print("<b>")\n\n    # & more'
ANSWER = [
    "<think>", "It wants", " code.", "</think>", "Here **it** is", ", as `x < y`:\n\n", f"```python\n{CODE}", "\n```\n",
    "\nRead <https://example.org/a?b=1&c=2>.",
]  # fmt: skip
HOSTILE = [
    "<script>window.hacked = 1</script>\n",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload=window.hacked=1>",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>\n\n",
    "[a](javascript:window.hacked=1) ",
    "[b](JaVaScRiPt:window.hacked=1) ",
    "[c](data:text/html,<script>1</script>) ",
    '[d](https://example.org/"onclick=1) ',
    "![e](http://127.0.0.1:9/steal?x=1) ",
    "<javascript:window.hacked=1>\n\n",
    "```</code></pre><script>window.hacked=1\n",
    "</textarea></pre><script>window.hacked=2</script>\n",
    "```\n| <i>a</i> | b |\n|---|---|\n| <b>1</b> | 2 |\n\n",
    "# <u>head</u>\n\n",
    "> <s>quote</s>\n\n- <em>item</em>\n\n",
    "~~~<script>\nnever closed <script>window.hacked=3</script>",
]


def write_models(folder):
    """talker.gguf, hostile.gguf and endless.gguf."""
    loop = [f" w{i}" for i in range(40)]
    scripted_llama(folder / "talker.gguf", ANSWER, template=TEMPLATE)
    scripted_llama(folder / "hostile.gguf", HOSTILE, template=TEMPLATE)
    long = {"llama.context_length": 100_000}
    scripted_llama(folder / "endless.gguf", loop, template=TEMPLATE, endless=True, metadata=long)
    return folder


@contextmanager
def serving_at(*options):
    """The address of `gguf-engine serve` with these options."""
    command = [sys.executable, "-m", "engine", "serve", "--port", "0", "--device", "cpu", "-t", "1", *map(str, options)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        for line in process.stdout:
            if address := re.search(r"page: (http://\S+)/", line):
                yield address[1]
                return
        raise AssertionError("the server did not start")
    finally:
        process.terminate()
        process.stdout.close()
        assert process.wait(60) == 0


class Page:
    """A page in a profile of its own, with what it asked for and complained about."""

    def __init__(self, chromium, address, **options):
        self.address = address
        self.context = chromium.new_context(**options)
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.requests, self.problems = [], []
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._console)

    def _console(self, message):
        # While a model is opened /health says so with status 503, which the browser writes down.
        if message.type in ("error", "warning") and "status of 503" not in message.text:
            self.problems.append(message.text)

    def open(self, model=None, wait=True):
        self.page.goto(self.address)
        if model is not None:
            self.page.get_by_label("Model", exact=True).select_option(model)
        if wait:
            self.ready()
        return self

    def ready(self):
        self.page.locator("#send:not([disabled])").wait_for()

    def say(self, text):
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def answered(self, n):
        """Wait until the n-th message is a whole one."""
        self.page.locator(f".message:nth-child({n}):not(.running) .tools button").first.wait_for()
        return self.page.locator(f".message:nth-child({n})")

    def bodies(self):
        """What was sent to be generated."""
        return [json.loads(one.post_data) for one in self.requests if one.method == "POST"]

    def hosts(self):
        return {urlsplit(one.url).netloc for one in self.requests}
