"""What only Linux has: without it the engine falls back by itself and gives the same text.

Affinity masks, /proc and /sys, madvise, fork hooks and sched_yield are taken away, in a process of its own.
"""

import json
import subprocess
import sys

import pytest

from engine import LLM, SamplingParams

WITHOUT = """
import ctypes, json, mmap, os, pathlib, sys

library = ctypes.CDLL
def named_library(name, *arguments, **settings):
    if name is None:
        raise TypeError("not on this system")
    return library(name, *arguments, **settings)

for module, prefix in ((os, "sched_"), (os, "register_at_fork"), (os, "fork"), (mmap, "MADV_")):
    for name in [name for name in vars(module) if name.startswith(prefix)]:
        delattr(module, name)
found = pathlib.Path.read_text
def read_text(self, *arguments, **settings):
    if str(self).startswith(("/proc", "/sys")):
        raise FileNotFoundError(self)
    return found(self, *arguments, **settings)
pathlib.Path.read_text = read_text
ctypes.CDLL = named_library

from engine import LLM, SamplingParams
from engine.cpu.steps.program import can_record
from engine.cpu.threads import default_threads

with LLM(device="auto", threads=2) as llm:
    result = llm.generate("Once upon a time", SamplingParams(max_tokens=12, seed=4))
    answer = {"recorded": can_record(llm.model.weights), "threads": default_threads(), "text": result.text}
    held = llm.model.weights.token_embd.raw  # a view that outlives the file
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def elsewhere():
    done = subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_same_text_without_what_only_linux_has(elsewhere):
    with LLM(device="cpu", threads=2) as llm:
        assert elsewhere["text"] == llm.generate("Once upon a time", SamplingParams(max_tokens=12, seed=4)).text


def test_fallbacks(elsewhere):
    assert not elsewhere["recorded"]
    assert elsewhere["threads"] >= 1
