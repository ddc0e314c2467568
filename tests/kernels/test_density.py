"""The density on the device, against that of the lists."""

import pytest
import torch

from sparse_dit.kernels import density_triton
from sparse_dit.kernels.density import measured_density
from sparse_dit.kernels.lists import mask_to_lists


@pytest.mark.parametrize("length", [180, 192, 5])
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (64, 16), (64, 32), (16, 32)])
def test_the_density_on_the_device_is_that_of_the_lists(random_mask, monkeypatch, length, block_q, block_k):
    monkeypatch.setattr(density_triton, "ROWS", 32)
    mask = random_mask(2, 3, -(-length // block_q), -(-length // block_k))
    lists = mask_to_lists(mask, block_q, block_k)
    shared = mask_to_lists(mask[:1, :1], block_q, block_k)
    for some in (lists, shared):
        exact = some.density(length, length)
        assert float(measured_density(some, length)) == pytest.approx(exact, rel=1e-12)
        found = density_triton.triton_density(some, length)
        assert found.dtype is torch.float64
        assert float(found) == pytest.approx(exact, rel=1e-12)
