import threading

import numpy as np

from engine.cpu import rooms as rooms_module
from engine.cpu.memory import array_address
from engine.cpu.rooms import LEAST, Rooms

SHAPE = (16, LEAST // 16)


def test_memory_is_used_again_when_no_view_of_it_is_left():
    rooms = Rooms()
    first = rooms.empty(*SHAPE)
    assert first.dtype == np.float32
    assert array_address(first) % 64 == 0
    place, view = array_address(first), first[3:5, 1:].T
    del first
    other = rooms.empty(*SHAPE)
    assert array_address(other) != place
    view[...] = 1
    del view
    assert array_address(rooms.empty(*SHAPE[::-1], dtype=np.int32)) == place
    small = rooms.empty(4, 4)
    assert small.nbytes < LEAST
    assert rooms.empty(0, 4).shape == (0, 4)


def test_what_is_kept_has_a_limit(monkeypatch):
    monkeypatch.setattr(rooms_module, "MOST", 4 * LEAST)
    rooms = Rooms()
    held = [rooms.empty(LEAST, dtype=np.uint8) for _ in range(10)]
    places = {array_address(array) for array in held}
    del held
    again = [rooms.empty(LEAST, dtype=np.uint8) for _ in range(4)]
    assert {array_address(array) for array in again} <= places
    del again
    rooms.empty(2 * LEAST, dtype=np.uint8)  # of another size: what was kept goes
    assert sum(len(free) for free in rooms._free.values()) == 1
    rooms.clear()
    assert not rooms._free


def test_threads_never_share_memory():
    rooms, wrong = Rooms(), []

    def work(number):
        for _ in range(300):
            array = rooms.empty(LEAST, dtype=np.uint8)
            array[::512] = number
            if (array[::512] != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
