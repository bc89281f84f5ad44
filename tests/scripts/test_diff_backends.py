"""scripts/diff_backends.py: operands are compared number by number."""

import numpy as np

from engine.cuda.matrix.gemm import Operand
from engine.cuda.matrix.gemm_plan import operand_bytes
from scripts.diff_backends import on_host
from tests.support.gpu.packed_rows import operand_rows


def test_an_operand_is_read_in_the_order_of_its_columns():
    class OnDevice(np.ndarray):
        def get(self):
            return np.array(self)

    halfs = (
        np.random.default_rng(3).standard_normal(operand_bytes(13, 256) // 2 + 64).astype(np.float16)
    )  # of a larger buffer
    found = on_host(Operand(halfs.view(np.uint8).view(OnDevice), 13, 256))
    assert np.array_equal(found, operand_rows(halfs[:-64].view(np.uint8), 16, 256)[:13])
