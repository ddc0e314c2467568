import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_dit.kernels.bits import bits_to_lists, lists_to_bits
from sparse_dit.kernels.bits_triton import triton_bits_to_lists, triton_lists_to_bits
from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.lists import lists_to_mask, mask_to_lists, pack_bits, unpack_bits


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.tuples(*(st.integers(1, top) for top in (2, 3, 9, 40))), seed=st.integers(0, 2**20))
def test_there_and_back(random_mask, shape, seed):
    mask = random_mask(*shape, 0.5, seed)
    bits = pack_bits(mask)
    assert bits.shape == (*shape[:3], -(-shape[-1] // 8))
    assert bits.flatten().tolist() == np.packbits(mask.numpy(), axis=-1, bitorder="little").flatten().tolist()
    assert torch.equal(unpack_bits(bits, shape[-1]), mask)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (2, 2, 3, 70))),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_the_kernels_agree(random_mask, shape, density, seed):
    """Lists of any width to the bits of their mask, and back to the same lists."""
    mask = random_mask(*shape, density, seed)
    for lists in (mask_to_lists(mask, 16, 16), mask_to_lists(mask, 16, 16, capacity=shape[-1])):
        bits = triton_lists_to_bits(lists, shape[-1])
        assert torch.equal(bits, pack_bits(mask))
    indices, counts = triton_bits_to_lists(bits, shape[-1])
    again = BlockList(indices, counts, 16, 16)  # which checks them
    assert torch.equal(lists_to_mask(again, shape[-1]), mask)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kept_lists_come_back(random_mask, device):
    mask = random_mask(2, 3, 7, 601, 0.2)
    bits = lists_to_bits(mask_to_lists(mask, 64, 32).to(device), 601)
    assert (bits.shape, bits.dtype, bits.device.type) == ((2, 3, 7, 76), torch.uint8, device)
    lists = bits_to_lists(bits, 601, 64, 32)
    assert (lists.block_q, lists.block_k, lists.key_blocks, lists.indices.shape[-1]) == (64, 32, 601, 601)
    assert torch.equal(lists_to_mask(lists.to("cpu"), 601), mask)


def test_entries_behind_the_count_are_ignored():
    indices = torch.tensor([[2, 2**31 - 1, -5]], dtype=torch.int32)[None, None]
    lists = BlockList(indices, torch.ones(1, 1, 1, dtype=torch.int32), 16, 16)
    assert triton_lists_to_bits(lists, 4).tolist() == lists_to_bits(lists, 4).tolist() == [[[[4]]]]


def test_bad_arguments(random_mask):
    with pytest.raises(ValueError, match=r"^mask: torch.float32 \[2\]; valid: bool \[\.\.\., key blocks\]$"):
        pack_bits(torch.ones(2))
    with pytest.raises(ValueError, match=r"^bits: torch.uint8 \[2\]; valid: uint8 \[\.\.\., 3\] for 17 blocks$"):
        unpack_bits(torch.ones(2, dtype=torch.uint8), 17)
    with pytest.raises(ValueError, match=r"^key_blocks: 3; valid: at least 4, which the lists reach$"):
        lists_to_bits(mask_to_lists(torch.ones(1, 1, 2, 4, dtype=torch.bool), 16, 16), 3)
    with pytest.raises(
        ValueError, match=r"^bits: torch.uint8 \[1, 1, 2, 1\]; valid: uint8 \[\.\.\., 2\] for 9 blocks$"
    ):
        bits_to_lists(torch.ones(1, 1, 2, 1, dtype=torch.uint8), 9, 16, 16)
