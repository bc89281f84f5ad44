import threading

import numpy as np

from engine.cpu import reused_memory
from engine.cpu.memory import array_address
from engine.cpu.reused_memory import LEAST, ReusedMemory

SHAPE = (16, LEAST // 16)


def test_memory_is_used_again_when_no_view_of_it_is_left():
    kept = ReusedMemory()
    first = kept.empty(*SHAPE)
    assert first.dtype == np.float32
    assert array_address(first) % 64 == 0
    place, view = array_address(first), first[3:5, 1:].T
    del first
    other = kept.empty(*SHAPE)
    assert array_address(other) != place
    view[...] = 1
    del view
    assert array_address(kept.empty(*SHAPE[::-1], dtype=np.int32)) == place
    small = kept.empty(4, 4)
    assert small.nbytes < LEAST
    assert kept.empty(0, 4).shape == (0, 4)


def test_what_is_kept_has_a_limit(monkeypatch):
    monkeypatch.setattr(reused_memory, "MOST", 4 * LEAST)
    kept = ReusedMemory()
    held = [kept.empty(LEAST, dtype=np.uint8) for _ in range(4)]
    places = {array_address(array) for array in held}
    del held
    again = [kept.empty(LEAST, dtype=np.uint8) for _ in range(4)]
    assert {array_address(array) for array in again} == places
    assert kept.kept_bytes == 4 * LEAST
    assert kept.empty(5 * LEAST, dtype=np.uint8).nbytes == 5 * LEAST
    assert kept.kept_bytes == 4 * LEAST
    kept.empty(2 * LEAST, dtype=np.uint8)  # of another size: what was kept goes
    assert kept.kept_bytes == 2 * LEAST
    again[0][:] = 7  # memory in use stays what it is
    kept.clear()
    assert kept.kept_bytes == 0
    assert (again[0] == 7).all()


def test_threads_never_share_memory():
    kept, wrong = ReusedMemory(), []

    def work(number):
        for _ in range(300):
            array = kept.empty(LEAST, dtype=np.uint8)
            array[::512] = number
            if (array[::512] != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
