import time

import pytest

from tests.support.servers.fake_hub import fake_hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake hub that this process downloads from, into a cache of its own."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with fake_hub() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.address)
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))  # pauses between attempts
        yield fake
