"""The density of lists where they are."""

import pytest
import torch

from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.density import measured_density, torch_density
from sparse_dit.kernels.density_triton import triton_density
from sparse_dit.kernels.lists import mask_to_lists

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [180, 192, 5, 17])
@pytest.mark.parametrize("block_q", [16, 64])
@pytest.mark.parametrize("block_k", [16, 32])
def test_it_is_that_of_the_lists(random_mask, length, block_q, block_k, device):
    mask = random_mask(2, 3, -(-length // block_q), -(-length // block_k))
    blocks = mask_to_lists(mask, block_q, block_k)
    expected = pytest.approx(blocks.density(length, length), rel=1e-12)
    for measure in (measured_density, torch_density, triton_density):
        density = measure(blocks.to(device), length)
        assert (density.shape, density.dtype, density.device.type) == ((), torch.float64, device)
        assert float(density) == expected


def test_more_rows_than_the_program_looks_at_at_once(random_mask):
    length = 16 * 4000 - 3
    blocks = mask_to_lists(random_mask(1, 1, 4000, 500), 16, 128)
    assert float(triton_density(blocks, length)) == pytest.approx(blocks.density(length, length), rel=1e-12)


def test_what_stands_behind_the_count_is_not_read():
    """The ragged block, say, which narrower lists than their capacity may still hold."""
    indices = torch.tensor([[0, 2, 2], [1, 2, 0], [0, 1, 2]], dtype=torch.int32)[None, None]
    blocks = BlockList(indices, torch.tensor([1, 2, 3], dtype=torch.int32)[None, None], 16, 16, key_blocks=3)
    area = 16 * 16 + 16 * (16 + 3) + 3 * (32 + 3)
    assert float(triton_density(blocks, 35)) == float(torch_density(blocks, 35)) == pytest.approx(area / 35**2)
