"""What only the host backend has: plans, groups, bounded memory, and the path without a fused kernel."""

import gc

import pytest
import torch

from sparse_dit.kernels import host
from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.kernels.oracle import oracle_attention


@pytest.fixture
def planned(monkeypatch):
    """Counts how often a list is taken apart."""
    calls = []
    groups = host._groups
    monkeypatch.setattr(host, "_groups", lambda *args: calls.append(args) or groups(*args))
    return calls


def test_a_list_is_planned_once_and_forgotten_with_it(qkv, random_mask, planned):
    q, k, v = qkv(1, 1, 200, 16)
    known = len(host._plans)
    lists = mask_to_lists(random_mask(1, 1, 4, 4), 64, 64)
    for _ in range(3):
        block_sparse_attention(q, k, v, lists)
    assert len(planned) == 1
    assert len(host._plans) == known + 1
    planned.clear()
    del lists
    gc.collect()
    assert len(host._plans) == known


def test_a_plan_fits_its_list_and_lengths_only(check, qkv, random_mask, planned):
    """One indices tensor with other counts, or for another length, or changed in place, is planned anew."""
    q, k, v = qkv(1, 1, 256, 16)
    mask = random_mask(1, 1, 4, 4, density=0.6)
    lists = mask_to_lists(mask, 64, 64)
    fewer = BlockList(lists.indices, torch.ones_like(lists.counts), 64, 64)
    only_first = torch.zeros_like(mask).scatter_(-1, lists.indices[..., :1].long(), True)
    for blocks, expected, seq in ((lists, mask, 256), (fewer, only_first, 256), (fewer, only_first, 230)):
        q, k, v = (x[:, :, :seq] for x in (q, k, v))
        out, _ = block_sparse_attention(q, k, v, blocks)
        torch.testing.assert_close(out.double(), oracle_attention(q, k, v, expected, 64, 64)[0], atol=1e-5, rtol=0)
    assert len(planned) == 3
    fewer.indices[..., 0] = 2
    out, _ = block_sparse_attention(q, k, v, fewer)
    moved = torch.zeros_like(mask)
    moved[..., 2] = True
    torch.testing.assert_close(out.double(), oracle_attention(q, k, v, moved, 64, 64)[0], atol=1e-5, rtol=0)


def test_lists_made_in_inference_mode(qkv, random_mask):
    q, k, v = qkv(1, 1, 200, 16)
    mask = random_mask(1, 1, 4, 4)
    with torch.inference_mode():
        out, _ = block_sparse_attention(q, k, v, mask_to_lists(mask, 64, 64))
    torch.testing.assert_close(out.double(), oracle_attention(q, k, v, mask, 64, 64)[0], atol=1e-5, rtol=0)


def test_equal_rows_become_one_longer_query():
    mask = torch.ones(1, 1, 6, 4, dtype=torch.bool)
    mask[..., 1, 2:] = False
    mask[..., 4, 2:] = False
    mask[..., 5, :2] = False
    lists = mask_to_lists(mask, 64, 64)
    groups = host._groups(lists.indices[0], lists.counts[0], key_blocks=4, ragged=False)
    found = sorted((group.queries.tolist(), group.keys.tolist()) for group in groups)
    assert found == [([[0, 2, 3]], [[0, 1, 2, 3]]), ([[1, 4]], [[0, 1]]), ([[5]], [[2, 3]])]


def test_calls_stay_within_the_gather_budget(check, qkv, random_mask, monkeypatch):
    """The result does not depend on how much is gathered at once, down to one block."""
    q, k, v = qkv(2, 2, 300, 16)
    mask = random_mask(1, 2, 10, 10)
    for elements in (1, 5 * 32 * 16, 2**20):
        monkeypatch.setattr(host, "GATHERED", elements)
        check(q, k, v, mask, 32, 32, "host")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_fused_kernel(check, qkv, random_mask, monkeypatch, dtype):
    """Devices other than the CPU compute scores in parts: here on the CPU, 7 queries at a time."""
    monkeypatch.setattr(host, "_fused_attention", host._explicit_attention)
    monkeypatch.setattr(host, "SCORES", 7 * 2 * 64)
    q, k, v = qkv(2, 2, 300, 24, dtype)
    check(q, k, v, random_mask(1, 1, 5, 5), 64, 64, "host")
