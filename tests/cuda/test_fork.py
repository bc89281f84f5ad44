"""A model on a GPU in the child of a fork: a clear error at once, and nothing that reaches the driver."""

import os

import pytest

from engine.api.stream import Stream
from engine.errors import DeviceError
from engine.request import Request
from engine.sampling.params import SamplingParams
from engine.scheduling.job import Job
from engine.scheduling.loop import EngineLoop
from engine.scheduling.output import OutputAssembler
from tests.support.forking import in_child
from tests.support.gpu.fake_runner import pretended, sparse_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_a_child_gets_a_device_error(monkeypatch, tmp_path):
    path = sparse_model(tmp_path / "model.gguf", "qwen2-0.5b")
    request = Request(1, [1, 2, 3], SamplingParams(), 0, 5)
    with pretended(monkeypatch, path) as (runner, gpu):
        loop = EngineLoop(runner)

        def child():
            stream = Stream(loop, Job(request, OutputAssembler(request, None, ())))
            with pytest.raises(DeviceError, match="forked from one that had opened a model on the GPU"):
                stream.result()
            for call in (lambda: runner.logits([1]), runner.read_bandwidth, lambda: runner.copy_pages([(0, 1)])):
                with pytest.raises(DeviceError, match='"spawn"'):
                    call()
            gpu.restart()
            runner.release(0)
            loop.close()
            assert gpu.launches == []

        in_child(child)
