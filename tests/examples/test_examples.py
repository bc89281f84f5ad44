"""Every program in examples/ runs with the bundled model and shows what it says that it shows."""

import io
import re
import runpy
import sys

import pytest

from engine import LLM, SamplingParams
from tests.conftest import ROOT
from tests.support.servers.http_server import running

EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example in this process, where kernels are loaded already; returns what it prints."""
    open_cpu = LLM.__init__

    def on_two_threads(self, model=None, **options):
        open_cpu(self, model, device="cpu", threads=2, **options)

    monkeypatch.setattr(LLM, "__init__", on_two_threads)

    def run(name, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def chat_server():
    """A server of the bundled model with the chat template of the examples."""
    template = (EXAMPLES / "chat.jinja").read_text()
    with running(engine={"chat_template": template}) as server:
        yield server


def test_stream(run, llm):
    text = llm.generate("The sea", SamplingParams(max_tokens=60, seed=1)).text
    out = run("stream.py", "The sea")
    assert out.startswith(f"The sea{text}\n[length: 60 tokens, ")


def test_batch(run, llm):
    out = run("batch.py")
    greedy = llm.generate("Once upon a time", SamplingParams(max_tokens=24, temperature=0)).text
    assert out.startswith(f"Once upon a time{greedy} [length]\n")
    assert "[stop]\nsample 1, seed 3: " in out
    sampled = llm.generate("The cat said", SamplingParams(max_tokens=12, seed=5)).text
    assert out.endswith(f"\nsample 3, seed 5: The cat said{sampled}\n")
    assert len(re.findall(r"\[length\]|\[stop\]|sample \d, seed", out)) == 6


def test_chat(run, llm):
    first, second = "There was a poor woodcutter.", "One day he met a fox."
    answers = run("chat.py", stdin=f"{first}\n{second}\n").removesuffix("\n")
    text = llm.generate(first, SamplingParams(max_tokens=40, seed=1)).text
    assert answers.startswith(text + "\n")
    prompt = f"{first} {text.strip()} {second}"
    assert answers == text + "\n" + llm.generate(prompt, SamplingParams(max_tokens=40, seed=3)).text


def test_threads(run):
    lines = run("threads.py").splitlines()
    assert lines[-1] == "the same texts one after the other: True"
    assert len(set(lines)) == len(lines)


def test_own_step_loop(run, llm):
    out = run("own_step_loop.py")
    assert re.findall(r"request (\d) \[(\w+)\]", out) == [("2", "cancelled"), ("1", "length"), ("3", "length")]
    for number, prompt in ((0, "Once upon a time"), (6, "In the forest there lived")):
        assert prompt + llm.generate(prompt, SamplingParams(max_tokens=25, seed=number)).text in out


def test_asyncio_llm(run, llm):
    lines = run("asyncio_llm.py").splitlines()
    assert lines[-1] == "given up; requests left: 0"
    for seed, prompt in enumerate(["Once upon a time", "The old king", "In the forest there lived"]):
        assert prompt + llm.generate(prompt, SamplingParams(max_tokens=24, seed=seed)).text in "\n".join(lines)


def test_openai_client(run, llm):
    def open_model(source, device, threads, **settings):
        return LLM(source, **settings)  # which sets device and threads itself, see above

    with running(open_llm=open_model) as server:
        lines = run("openai_client.py", server.url + "/v1").splitlines()
    assert lines[0] == "models: tales"
    text = llm.generate("The sea", SamplingParams(max_tokens=40, seed=1)).text
    assert "\n".join(lines[1:]).startswith(text)
    assert lines[-1] == "The old king" + llm.generate("The old king", SamplingParams(max_tokens=16, seed=1)).text


def test_structured_output(run):
    hero, afraid, at, *items = run("structured_output.py").splitlines()
    assert re.fullmatch(r"'.{0,12}' is \d{1,3} years old and has [012] friends", hero)
    assert afraid in ("yes", "no")
    assert re.fullmatch("[0-2][0-9]:[0-5][0-9]", at)
    assert all(re.fullmatch("(- [a-z]+)?", item) for item in items)


def test_tool_loop(run):
    def open_model(source, device, threads, **settings):
        return LLM(source, **settings)

    with running(open_llm=open_model) as server:
        lines = run("tool_loop.py", server.url + "/v1").splitlines()
    assert re.fullmatch(r"call: forecast -> .*: sun for [1-7] days", lines[0])
    assert lines[1].startswith("answer: ")


def test_pydantic_models(run, chat_server):
    hero, travel = run("pydantic_models.py", chat_server.url + "/v1").splitlines()
    assert re.fullmatch(r"""['"].{0,16}['"] is \d{1,3} and knows [012]""", hero)
    assert re.fullmatch(r"""to ['"].*['"] (on foot|by boat)""", travel)


def test_anthropic_agent(run, chat_server):
    out = run("anthropic_agent.py", chat_server.url)
    assert re.match(r"\ncall of (weather|distance): \{", out)
    reasons = re.findall(r"^\[(\w+)\]$", out, re.MULTILINE)
    assert reasons[0] in ("tool_use", "max_tokens")
    assert 2 <= len(reasons) <= 3


def test_every_example_is_tested():
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert {path.name for path in EXAMPLES.glob("*.py")} <= tested


def test_search(run, llm):
    lines = run("search.py", "Where did the fox go?").splitlines()
    found = {line[6:]: float(line[:5]) for line in lines}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    (vector,) = llm.embed("Where did the fox go?")
    for text, cosine in found.items():
        assert cosine == pytest.approx(float(llm.embed(text)[0] @ vector), abs=2e-3)
