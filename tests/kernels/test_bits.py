import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_dit.kernels.lists import pack_bits, unpack_bits


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.tuples(*(st.integers(1, top) for top in (2, 3, 9, 40))), seed=st.integers(0, 2**20))
def test_there_and_back(random_mask, shape, seed):
    mask = random_mask(*shape, 0.5, seed)
    bits = pack_bits(mask)
    assert bits.shape == (*shape[:3], -(-shape[-1] // 8))
    assert bits.flatten().tolist() == np.packbits(mask.numpy(), axis=-1, bitorder="little").flatten().tolist()
    assert torch.equal(unpack_bits(bits, shape[-1]), mask)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"^mask: torch.float32 \[2\]; valid: bool \[\.\.\., key blocks\]$"):
        pack_bits(torch.ones(2))
    with pytest.raises(ValueError, match=r"^bits: torch.uint8 \[2\]; valid: uint8 \[\.\.\., 3\] for 17 blocks$"):
        unpack_bits(torch.ones(2, dtype=torch.uint8), 17)
