"""Block lists and masks say the same, and what is neither is refused."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.lists import lists_to_mask, mask_to_lists


def test_a_mask_by_hand():
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)[None, None]
    lists = mask_to_lists(mask, 64, 32)
    assert lists.counts.tolist() == [[[2, 1, 3]]]
    rows = [row[:count] for row, count in zip(lists.indices[0, 0].tolist(), [2, 1, 3], strict=True)]
    assert rows == [[1, 3], [0], [0, 1, 2]]
    assert lists.indices.shape == (1, 1, 3, 3)
    assert lists.indices.dtype is lists.counts.dtype is torch.int32
    assert (lists.block_q, lists.block_k, lists.key_blocks) == (64, 32, 4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (2, 3, 9, 40))),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_there_and_back(random_mask, shape, density, seed):
    mask = random_mask(*shape, density, seed)
    lists = mask_to_lists(mask, 16, 16)
    assert torch.equal(lists_to_mask(lists, shape[-1]), mask)
    trusted = mask_to_lists(mask, 16, 16, capacity=shape[-1])
    assert torch.equal(lists_to_mask(trusted, shape[-1]), mask)
    # What mask_to_lists vouches for also passes the full check.
    BlockList(lists.indices, lists.counts, 16, 16)


def test_entries_behind_the_count_are_ignored():
    indices = torch.tensor([[2, 2**31 - 1, -5]], dtype=torch.int32)[None, None]
    lists = BlockList(indices, torch.ones(1, 1, 1, dtype=torch.int32), 16, 16)
    assert lists.key_blocks == 3
    assert lists_to_mask(lists, 4).flatten().tolist() == [False, False, True, False]


def test_an_empty_row_is_an_error():
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1] = False
    with pytest.raises(ValueError, match=r"^mask: 1 query blocks have no key block; valid: at least one each$"):
        mask_to_lists(mask, 16, 16)


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 2, 2), torch.ones(2, 2, dtype=torch.bool)])
def test_a_mask_of_another_kind_is_an_error(mask):
    with pytest.raises(ValueError, match=r"^mask: .*; valid: a non-empty bool \[B or 1, H or 1, QB, KB\]$"):
        mask_to_lists(mask, 16, 16)


def test_a_mask_too_narrow_is_an_error():
    lists = mask_to_lists(torch.ones(1, 1, 2, 5, dtype=torch.bool), 16, 16)
    with pytest.raises(ValueError, match=r"^key_blocks: 4; valid: at least 5, which the lists reach$"):
        lists_to_mask(lists, 4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seq_q=st.integers(1, 150), seq_k=st.integers(1, 150), density=st.floats(0, 1), seed=st.integers(0, 2**20))
def test_density_is_the_mean_of_the_token_mask(random_mask, seq_q, seq_k, density, seed):
    mask = random_mask(2, 3, -(-seq_q // 32), -(-seq_k // 16), density, seed)
    tokens = mask.repeat_interleave(32, dim=2).repeat_interleave(16, dim=3)[:, :, :seq_q, :seq_k]
    assert mask_to_lists(mask, 32, 16).density(seq_q, seq_k) == pytest.approx(tokens.float().mean().item(), rel=1e-5)


def test_a_bad_capacity():
    with pytest.raises(ValueError, match=r"^capacity: 6; valid: 1 to 5, the key blocks of the mask$"):
        mask_to_lists(torch.ones(2, 3, 4, 5, dtype=torch.bool), 16, 16, capacity=6)
