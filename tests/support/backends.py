"""CPU backends over files, closed together, and tokens fed to them."""

from contextlib import contextmanager

from engine.cpu.backend import CpuBackend
from engine.gguf.reader import open_gguf
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model


@contextmanager
def backends():
    """A function that opens a backend over a file; all are closed behind the block."""
    closing = []

    def opened(path, **options):
        gguf = open_gguf(path)
        backend = CpuBackend(load_model(gguf), **({"threads": 2, "max_sequences": 3} | options))
        closing.append((backend, gguf))
        return backend

    yield opened
    while closing:
        backend, gguf = closing.pop()
        backend.close()
        del backend.model
        del backend
        gguf.close()


def feed(backend, slot, tokens, start=0, place=None):
    """Logits of all tokens, fed to a slot from a position on."""
    return backend.forward(Batch.build([(slot, tokens, start, Outputs.ALL, None, place)]))
