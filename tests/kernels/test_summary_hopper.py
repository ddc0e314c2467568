"""Summaries inside the Hopper kernel: on a Hopper GPU against the oracle."""

import math

import pytest
import torch

from sparse_dit.kernels.backends import HOPPER_BLOCK_K, HOPPER_HEAD_SIZES
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.ops import block_sparse_attention


def blocks(seq, block):
    return -(-seq // block)


def orders(heads, seq):
    return torch.stack([torch.randperm(seq, device="cuda") for _ in range(heads)])


def uneven_mask(heads, q_blocks, k_blocks):
    """Rows of 1, 2, .. and at the end of all key blocks, at random places."""
    generator = torch.Generator().manual_seed(k_blocks)
    place = torch.rand(1, heads, q_blocks, k_blocks, generator=generator).argsort(dim=-1).argsort(dim=-1)
    counts = torch.linspace(1, k_blocks, q_blocks).round()
    return (place < counts[:, None]).cuda()


@pytest.mark.gpu
class TestCuda:
    @pytest.fixture(autouse=True)
    def _on_hopper(self):
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a Hopper GPU")
        poison = torch.full((2**27,), torch.nan, device="cuda", dtype=torch.bfloat16)
        del poison  # what fresh memory will hold

    @pytest.mark.parametrize("head_size", HOPPER_HEAD_SIZES)
    @pytest.mark.parametrize("seq", [1, 63, 127, 129, 500, 1000])
    def test_ragged_lengths(self, check_summary, qkv, random_mask, seq, head_size):
        q, k, v = qkv(2, 3, seq, head_size, torch.bfloat16, "cuda")
        check_summary(q, k, v, random_mask(2, 3, blocks(seq, 128), blocks(seq, 64)).cuda(), 128, 64, "hopper")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("head_size", [64, 128])
    @pytest.mark.parametrize("block_k", HOPPER_BLOCK_K)
    def test_block_sizes(self, check_summary, qkv, random_mask, block_k, head_size, dtype):
        q, k, v = qkv(1, 2, 2304, head_size, dtype, "cuda")
        check_summary(q, k, v, random_mask(1, 1, 18, blocks(2304, block_k)).cuda(), 128, block_k, "hopper")

    @pytest.mark.parametrize("lists", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
    @pytest.mark.parametrize("order_heads", [0, 1, 2])
    def test_lists_and_orders_shared_and_per_head(self, check_summary, qkv, random_mask, lists, order_heads):
        q, k, v = qkv(2, 2, 700, 72, torch.float16, "cuda")
        order = orders(order_heads, 700) if order_heads else None
        check_summary(q, k, v, random_mask(*lists, 6, 22).cuda(), 128, 32, "hopper", order=order)

    @pytest.mark.parametrize("block_k", HOPPER_BLOCK_K)
    @pytest.mark.parametrize("head_size", [64, 128])
    def test_uneven_lists_over_many_tiles_of_means(self, check_summary, qkv, head_size, block_k):
        q, k, v = qkv(1, 2, 1500, head_size, torch.bfloat16, "cuda", seq_k=30_001)
        mask = uneven_mask(2, 12, blocks(30_001, block_k))
        check_summary(q, k, v, mask, 128, block_k, "hopper", scale=0.3)

    def test_a_model_size_with_text_rows(self, check_summary, qkv, random_mask):
        q, k, v = qkv(1, 1, 17_776, 64, torch.bfloat16, "cuda")
        mask = random_mask(1, 1, 139, 139, density=0.2).cuda()
        mask[..., -2:, :] = True
        mask[..., -2:] = True
        check_summary(q, k, v, mask, 128, 128, None)

    def test_views_with_offsets(self, check_summary, random_mask):
        memory = torch.randn(2, 333, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
        q, k, v = (memory[:, 33:, i].transpose(1, 2) for i in range(3))
        check_summary(q, k, v, random_mask(1, 1, 3, 3).cuda(), 128, 128, "hopper")

    @pytest.mark.parametrize("head_size", [64, 128])
    def test_rows_that_list_everything_are_those_of_drop(self, qkv, head_size):
        q, k, v = qkv(1, 2, 2304, head_size, torch.bfloat16, "cuda")
        mask = uneven_mask(2, 18, 36)
        mask[:, :, ::3] = True
        lists = mask_to_lists(mask, 128, 64)
        drop, whole = (
            block_sparse_attention(q, k, v, lists, skipped=how, backend="hopper") for how in ("drop", "summary")
        )
        dense = mask.all(dim=-1).repeat_interleave(128, dim=-1)
        for one, other in zip(drop, whole, strict=True):
            assert torch.equal(one[dense], other[dense])
            assert not torch.isclose(one[~dense], other[~dense]).all(dim=-1).any()

    def test_a_far_block_takes_over(self, qkv):
        """With all listed scores at -50 and those of one skipped block at 50, out is that block's mean of v."""
        q, k, v = qkv(1, 1, 1000, 64, torch.bfloat16, "cuda")
        q, k = torch.ones_like(q), torch.full_like(k, -1.0)
        k[:, :, 896:] = 1.0  # the ragged one, 104 tokens
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device="cuda")
        mask[..., 3:] = False
        out, lse = block_sparse_attention(
            q, k, v, mask_to_lists(mask, 128, 128), scale=50 / 64, skipped="summary", backend="hopper"
        )
        mean = v[:, :, 896:].float().mean(2, keepdim=True)
        torch.testing.assert_close(out.float(), mean.expand(1, 1, 1000, 64), atol=2**-9, rtol=2**-7)
        torch.testing.assert_close(lse, torch.full((1, 1, 1000), 50 + math.log(104), device="cuda"))

    def test_agrees_with_the_portable_kernels(self, qkv, random_mask):
        q, k, v = qkv(1, 4, 2304, 128, torch.bfloat16, "cuda")
        lists = mask_to_lists(random_mask(1, 4, 18, 36).cuda(), 128, 64)
        hopper, triton = (
            block_sparse_attention(q, k, v, lists, skipped="summary", backend=name) for name in ("hopper", "triton")
        )
        torch.testing.assert_close(hopper[0], triton[0], atol=2**-6, rtol=2**-6)
        torch.testing.assert_close(hopper[1], triton[1], atol=2e-4, rtol=1e-5)

    def test_calls_in_a_row_each_wait_for_their_own_means(self, qkv, random_mask):
        """Kernels overlap: a call that took its means too early, or those of another call, would give other bits."""
        lists = mask_to_lists(random_mask(1, 1, 40, 40, density=0.05).cuda(), 128, 128)
        sets = [[x * size for x in qkv(1, 12, 5100, 128, torch.bfloat16, "cuda")] for size in (1.0, 0.5)]
        first = []
        for one in sets:
            first.append(block_sparse_attention(*one, lists, skipped="summary", backend="hopper"))
            torch.cuda.synchronize()
        for run in range(40):
            out, lse = block_sparse_attention(*sets[run % 2], lists, skipped="summary", backend="hopper")
            assert torch.equal(out, first[run % 2][0])
            assert torch.equal(lse, first[run % 2][1])

    def test_a_cuda_graph_replays_it(self, qkv, random_mask):
        q, k, v = qkv(1, 4, 2304, 128, torch.bfloat16, "cuda")
        lists = mask_to_lists(random_mask(1, 4, 18, 18).cuda(), 128, 128)
        expected = block_sparse_attention(q, k, v, lists, skipped="summary", backend="hopper")
        wanted = [block_sparse_attention(q, 2 * k, v, lists, skipped="summary", backend="hopper"), expected]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = block_sparse_attention(q, k, v, lists, skipped="summary", backend="hopper")
        for factor, (wanted_out, wanted_lse) in zip((2.0, 0.5), wanted, strict=True):
            k *= factor
            graph.replay()
            assert torch.equal(out, wanted_out)
            assert torch.equal(lse, wanted_lse)

    def test_a_call_does_not_wait_for_the_gpu(self, qkv, random_mask):
        q, k, v = qkv(1, 2, 500, 64, torch.bfloat16, "cuda")
        lists = mask_to_lists(random_mask(1, 1, 4, 8).cuda(), 128, 64)
        order = orders(1, 500)
        block_sparse_attention(q, k, v, lists, order=order, skipped="summary", backend="hopper")  # compiles
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            block_sparse_attention(q, k, v, lists, order=order, skipped="summary", backend="hopper")
        finally:
            torch.cuda.set_sync_debug_mode(before)
