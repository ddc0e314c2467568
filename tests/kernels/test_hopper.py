"""The Hopper kernel: on a GPU against the oracle, elsewhere why it is not taken."""

import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparse_dit.kernels import launch_order_triton
from sparse_dit.kernels.backends import HOPPER_HEAD_SIZES, default_backend, hopper_refusal
from sparse_dit.kernels.launch_order_triton import launch_order, longest_first
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.kernels.oracle import oracle_attention
from sparse_dit.kernels.quantize import quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton runs

# Relative L2 errors of short rows (`quantize` has the table). In FP8 weights and values are rounded by up to 2^-4 each,
# evenly spread at worst: 2^-4 / sqrt(3). Where the last block of keys is a single token, rows may attend to it alone,
# and all of them round the same weight, by up to 2^-4.
SPREAD = 2**-4 / 3**0.5


def errors(seq, precision):
    """Bounds on the kernel's own roundings, of weights and of the output, and with those of q, k and v."""
    if precision == "int8":
        return 0.004, 0.016
    weights = 2**-4 if seq % 64 == 1 else SPREAD
    return weights, math.hypot(weights, SPREAD)


def blocks(seq: int, block: int) -> int:
    return -(-seq // block)


def error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def test_is_refused_off_hopper(qkv, random_mask):
    q, k, v = qkv(1, 2, 256, 64, torch.float16)
    lists = mask_to_lists(random_mask(1, 1, 2, 2), 128, 128)
    assert hopper_refusal(q, k, v, lists, "native") == "q is torch.float16 on cpu"
    assert default_backend(q, k, v, lists, "native") == "host"
    with pytest.raises(ValueError, match=r"^backend: 'hopper', but q is torch.float16 on cpu; valid: 'triton'"):
        block_sparse_attention(q, k, v, lists, backend="hopper")


@given(
    counts=arrays(
        np.int32, st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 300)), elements=st.integers(1, 9)
    )
)
@settings(max_examples=20, deadline=None)
def test_longest_lists_are_launched_first(counts):
    counts = torch.from_numpy(counts).to(DEVICE)
    assert longest_first(counts).equal(counts.argsort(dim=-1, descending=True, stable=True).int())


def test_the_launch_order_of_lists_is_found_once_and_goes_with_them():
    counts = torch.tensor([[[1, 3, 2]]], dtype=torch.int32, device=DEVICE)
    found = launch_order(counts)
    assert found.tolist() == [[[1, 2, 0]]]
    assert launch_order(counts) is found
    assert launch_order(counts.clone()) is not found
    gone = weakref.ref(found)
    del counts, found
    assert gone() is None


def test_each_stream_ranks_for_itself(monkeypatch):
    """Nothing tells one stream when the launches of another are over."""
    counts, found = torch.tensor([[[1, 3, 2]]], dtype=torch.int32, device=DEVICE), {}
    for stream in (1, 2, 1, 2):
        monkeypatch.setattr(launch_order_triton, "current_stream", lambda x, now=stream: now)
        assert launch_order(counts) is found.setdefault(stream, launch_order(counts))
    assert found[1] is not found[2]


def test_nothing_that_a_captured_graph_will_write_is_kept(monkeypatch):
    counts = torch.tensor([[[1, 3, 2]]], dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = launch_order(counts)
    assert launch_order(counts) is not captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kept = launch_order(counts)
    assert kept is not captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launch_order(counts) is kept, "it was there before the graph"


def test_lists_shared_by_heads_or_laid_out_elsewhere_are_ranked():
    counts = torch.randint(1, 9, (300, 2), dtype=torch.int32, device=DEVICE).T[:, None]
    assert longest_first(counts).equal(counts.argsort(dim=-1, descending=True, stable=True).int())


@pytest.mark.gpu
class TestCuda:
    @pytest.fixture(autouse=True)
    def _on_hopper(self):
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a Hopper GPU")

    @pytest.mark.parametrize("head_size", HOPPER_HEAD_SIZES)
    @pytest.mark.parametrize("seq", [1, 63, 127, 129, 500, 1000])
    def test_ragged_lengths(self, check, qkv, random_mask, seq, head_size):
        q, k, v = qkv(2, 3, seq, head_size, torch.bfloat16, "cuda")
        torch.full((2**24,), torch.nan, device="cuda")  # what fresh memory will hold
        check(q, k, v, random_mask(2, 3, blocks(seq, 128), blocks(seq, 64)).cuda(), 128, 64, "hopper")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("head_size", [64, 128])
    @pytest.mark.parametrize("block_k", [32, 64, 128])
    def test_block_sizes(self, check, qkv, random_mask, block_k, head_size, dtype):
        q, k, v = qkv(1, 2, 2304, head_size, dtype, "cuda")
        check(q, k, v, random_mask(1, 1, 18, blocks(2304, block_k)).cuda(), 128, block_k, "hopper")

    def test_cross_lengths_and_shared_lists(self, check, qkv, random_mask):
        q, k, v = qkv(2, 4, 300, 64, torch.bfloat16, "cuda", seq_k=1100)
        check(q, k, v, random_mask(1, 1, 3, blocks(1100, 64)).cuda(), 128, 64, "hopper")

    def test_model_size_with_dense_text_rows(self, check, qkv, random_mask):
        q, k, v = qkv(1, 1, 17_776, 64, torch.bfloat16, "cuda")
        mask = random_mask(1, 1, 139, 139, density=0.2).cuda()
        mask[..., -2:, :] = True
        mask[..., -2:] = True
        check(q, k, v, mask, 128, 128, "hopper")

    def test_views_with_offsets(self, check, random_mask):
        memory = torch.randn(2, 333, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
        q, k, v = (memory[:, 33:, i].transpose(1, 2) for i in range(3))
        check(q, k, v, random_mask(1, 1, 3, 3).cuda(), 128, 128, "hopper")

    def test_offsets_beyond_two_gigabytes(self, check, random_mask):
        memory = torch.randn(130, 2**25 // 64, 64, device="cuda", dtype=torch.bfloat16)  # tokens 2^25 elements apart
        last = memory.shape[1] - 1
        q, k, v = (memory[:, i : i + 1].transpose(0, 1)[None] for i in (0, 1, last))
        check(q, k, v, random_mask(1, 1, 2, 2).cuda(), 128, 128, "hopper")

    def test_agrees_with_triton(self, qkv, random_mask):
        q, k, v = qkv(1, 4, 2304, 128, torch.bfloat16, "cuda")
        lists = mask_to_lists(random_mask(1, 4, 18, 36).cuda(), 128, 64)
        assert default_backend(q, k, v, lists, "native") == "hopper"
        hopper, hopper_lse = block_sparse_attention(q, k, v, lists)
        triton, triton_lse = block_sparse_attention(q, k, v, lists, backend="triton")
        torch.testing.assert_close(hopper, triton, atol=2**-6, rtol=2**-6)
        torch.testing.assert_close(hopper_lse, triton_lse, atol=1e-4, rtol=1e-5)

    def test_a_stream_reads_no_ranks_that_another_one_has_still_to_write(self):
        counts = torch.randint(1, 99, (1, 4, 700), dtype=torch.int32).cuda()
        wanted = counts.cpu().argsort(dim=-1, descending=True, stable=True).int()
        longest_first(counts)  # compiles
        busy, other = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(busy):
            torch.cuda._sleep(10**9)
            late = launch_order(counts)
        with torch.cuda.stream(other):
            found = launch_order(counts).clone()
        other.synchronize()
        assert found.cpu().equal(wanted)
        assert not busy.query(), "it was over before the other stream could be early"
        busy.synchronize()
        assert late.cpu().equal(wanted)

    def test_a_graph_that_never_ran_leaves_no_ranks(self):
        counts = torch.randint(1, 99, (1, 4, 700), dtype=torch.int32).cuda()
        wanted = counts.cpu().argsort(dim=-1, descending=True, stable=True).int()
        longest_first(counts)  # compiles
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = launch_order(counts)
        with torch.cuda.stream(stream):
            assert launch_order(counts).cpu().equal(wanted)
        graph.replay()
        assert captured.cpu().equal(wanted)

    @pytest.mark.parametrize("ordered", [False, True])
    @pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
    @pytest.mark.parametrize("head_size", HOPPER_HEAD_SIZES)
    @pytest.mark.parametrize("seq", [1, 65, 129, 500, 1000])
    def test_codes(self, qkv, random_mask, seq, head_size, precision, ordered):
        """Against attention over what the codes stand for (the kernel's own roundings), and over q, k and v."""
        q, k, v = qkv(2, 2, seq, head_size, torch.bfloat16, "cuda")
        mask = random_mask(1, 2, blocks(seq, 128), blocks(seq, 64)).cuda()
        order = torch.stack([torch.randperm(seq, device="cuda") for _ in range(2)]) if ordered else None
        torch.full((2**24,), torch.nan, device="cuda")
        out, lse = block_sparse_attention(
            q, k, v, mask_to_lists(mask, 128, 64), precision=precision, order=order, backend="hopper"
        )
        # The codes of the same call: what is subtracted are means of tokens sampled before they are put in order.
        codes = quantize(q, k, v, precision=precision, scale=head_size**-0.5, order=order, backend="triton")
        heads = torch.arange(2, device="cuda")[:, None]
        if order is not None:
            q, k, v, out, lse = (x[:, heads, order] for x in (q, k, v, out, lse))
        expected, expected_lse = oracle_attention(q, k, v, mask, 128, 64)
        own, whole = errors(seq, precision)
        assert error(out, expected) <= whole
        torch.testing.assert_close(lse.double(), expected_lse, atol=0.1, rtol=0)
        meant_q, meant_k, meant_v = codes.dequantized()
        meant, _ = oracle_attention(meant_q, meant_k, meant_v, mask, 128, 64, scale=0.6931471805599453)
        assert error(out, meant) <= own

    @pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
    @pytest.mark.parametrize("block_k", [64, 128])
    def test_codes_at_a_model_size(self, qkv, random_mask, block_k, precision):
        q, k, v = qkv(1, 2, 2304, 128, torch.float16, "cuda")
        mask = random_mask(1, 1, 18, blocks(2304, block_k)).cuda()
        lists = mask_to_lists(mask, 128, block_k)
        out, _ = block_sparse_attention(q, k, v, lists, precision=precision, backend="hopper")
        assert (
            error(out, oracle_attention(q, k, v, mask, 128, block_k)[0]) <= {"int8": 0.015, "int8_fp8": 0.04}[precision]
        )

    @pytest.mark.parametrize("mean", [0.0, 1.0])
    def test_fp8_sums_keep_their_bits_over_long_rows(self, qkv, random_mask, mean):
        """Sums that grow with the row, over 400 tiles: the matrix unit alone would be off by as much as it computes."""
        q, k, v = qkv(1, 1, 51_200, 128, torch.bfloat16, "cuda")
        v = v + mean
        lists = mask_to_lists(torch.ones(1, 1, 400, 400, dtype=torch.bool, device="cuda"), 128, 128)
        out, _ = block_sparse_attention(q, k, v, lists, precision="int8_fp8", backend="hopper")
        rows = slice(0, 51_200, 331)
        weights = (q[:, :, rows].double() @ k.double().mT * 128**-0.5).softmax(dim=-1)
        spread = out[:, :, rows].double() - mean
        assert error(spread, weights @ (v.double() - mean)) <= (0.042 if mean == 0 else 0.3)

    def test_refuses_what_it_cannot_take(self, qkv, random_mask):
        q, k, v = qkv(1, 2, 256, 256, torch.bfloat16, "cuda")
        lists = mask_to_lists(random_mask(1, 1, 2, 2).cuda(), 128, 128)
        assert hopper_refusal(q, k, v, lists, "native") == "head size 256 is not one of (64, 72, 88, 96, 128)"
        assert default_backend(q, k, v, lists, "native") == "triton"
        q, k, v = qkv(1, 2, 256, 128, torch.bfloat16, "cuda")
        assert default_backend(q, k, v, lists, "int8_fp8") == "hopper"
        narrow = mask_to_lists(random_mask(1, 1, 2, 8).cuda(), 128, 32)
        assert default_backend(q, k, v, narrow, "int8") == "hopper"
        assert hopper_refusal(q, k, v, narrow, "int8_fp8") == "blocks of 128 by 32 are not 128 by one of (64, 128)"
        q, k, v = qkv(1, 2, 256, 64, torch.bfloat16, "cuda")
        finer = mask_to_lists(random_mask(1, 1, 4, 4).cuda(), 64, 64)
        assert hopper_refusal(q, k, v, finer, "native").startswith("blocks of 64 by 64 are not 128 by one of")
