"""Skipped blocks as summaries: every backend and precision against an oracle that writes the pseudo-keys down."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_dit.kernels import summary
from sparse_dit.kernels.backends import TRITON_HEAD_SIZES
from sparse_dit.kernels.gather import gather_tokens, scatter_tokens
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.ops import PRECISIONS, block_sparse_attention
from sparse_dit.kernels.oracle import oracle_attention, oracle_quantized_attention, oracle_summary_attention
from sparse_dit.kernels.oracle_blocks import oracle_block_means
from sparse_dit.kernels.quantize import quantize

BACKENDS = ["host", "triton"]
# Relative error that a precision adds to each weight of PV, see `tests.kernels.test_attention_int8`.
WEIGHT = {"native": 0.0, "int8": 0.0, "int8_fp8": 2.0**-4}


def blocks(seq, block):
    return math.ceil(seq / block)


def orders(heads, seq, device="cpu"):
    generator = torch.Generator().manual_seed(seq)
    return torch.stack([torch.randperm(seq, generator=generator) for _ in range(heads)]).to(device)


@pytest.fixture
def check_codes(summary_tolerances):
    """The same for codes: merges, in float64, attention on what they stand for with that over the pseudo-keys alone."""

    def compare(q, k, v, mask, block_q, block_k, precision, backend, order=None, scale=0.125):
        lists = mask_to_lists(mask, block_q, block_k)
        out, lse = block_sparse_attention(
            q, k, v, lists, scale=scale, precision=precision, order=order, skipped="summary", backend=backend
        )
        codes = quantize(
            q, k, v, precision=precision, scale=scale, order=order, backend="host" if backend == "host" else "triton"
        )
        if order is not None:
            q, k, v, out, lse = (gather_tokens(x, order) for x in (q, k, v, out, lse))
        listed_out, listed_lse, spread = oracle_quantized_attention(codes, mask, block_q, block_k)
        mean_k, mean_v = oracle_block_means(k, block_k), oracle_block_means(v, block_k)
        scores = (
            scale * q.double() @ mean_k.mT
            + summary.summary_logits(lists, k.shape[2]).repeat_interleave(block_q, dim=2)[:, :, : q.shape[2]].double()
        )
        total = torch.logaddexp(listed_lse, scores.logsumexp(dim=-1))
        share = (listed_lse - total).exp()[..., None]
        expected = share * listed_out + (scores - total[..., None]).exp() @ mean_v
        tolerance_out, tolerance_lse = summary_tolerances(q, k, v, scale, mean_k)
        top = float(v.float().abs().max())
        n = k.shape[2]
        added = 4 * WEIGHT[precision] * spread * share + (n * 2.0**-18 * top if WEIGHT[precision] else 0.0)
        error = (out.double() - expected).abs()
        assert (error <= tolerance_out + added).all(), float((error / (tolerance_out + added)).max())
        torch.testing.assert_close(lse.double(), total, atol=tolerance_lse, rtol=0)

    return compare


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seq", [1, 63, 64, 65, 127, 500])
def test_ragged_lengths(check_summary, qkv, random_mask, seq, backend):
    q, k, v = qkv(1, 1, seq, 64)
    check_summary(q, k, v, random_mask(1, 1, blocks(seq, 128), blocks(seq, 64)), 128, 64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_size", TRITON_HEAD_SIZES[1:])
def test_head_sizes(check_summary, qkv, random_mask, head_size, backend):
    q, k, v = qkv(1, 1, 150, head_size)
    check_summary(q, k, v, random_mask(1, 1, 3, 3), 64, 64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (16, 128), (64, 32), (128, 16), (128, 128)])
def test_block_sizes(check_summary, qkv, random_mask, block_q, block_k, backend):
    q, k, v = qkv(1, 1, 140, 64)
    check_summary(q, k, v, random_mask(1, 1, blocks(140, block_q), blocks(140, block_k)), block_q, block_k, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lists", "order_heads"),
    [((1, 1), 2), ((1, 2), 0), ((1, 2), 1), ((2, 1), 0), ((2, 1), 2), ((2, 2), 1), ((2, 2), 2)],
    ids=str,
)
def test_lists_and_orders_shared_and_per_head(check_summary, qkv, random_mask, lists, order_heads, backend):
    q, k, v = qkv(2, 2, 70, 64)
    order = orders(order_heads, 70) if order_heads else None
    check_summary(q, k, v, random_mask(*lists, 3, 5), 32, 16, backend, order=order)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_keys_than_queries(check_summary, qkv, random_mask, backend):
    q, k, v = qkv(1, 2, 70, 64, seq_k=300)
    check_summary(q, k, v, random_mask(1, 2, 2, 5), 64, 64, backend, scale=0.3)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("host", torch.float16), ("host", torch.bfloat16), ("triton", torch.float16)],
    ids=str,
)
def test_sixteen_bits(check_summary, qkv, random_mask, backend, dtype):
    q, k, v = qkv(2, 2, 200, 72, dtype)
    check_summary(q, k, v, random_mask(1, 2, 4, 13), 64, 16, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_with_odd_strides(check_summary, random_mask, backend):
    memory = torch.randn(64, 2, 3, 163)[..., 33:]
    q, k, v = (memory[:, :, i].permute(1, 2, 0)[None] for i in range(3))  # even the head dimension strided
    check_summary(q, k, v, random_mask(1, 2, 3, 9), 64, 16, backend)


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize("order_heads", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_codes(check_codes, qkv, random_mask, exact_fp8, precision, order_heads, backend):
    q, k, v = qkv(1, 2, 150, 64, torch.float16)
    order = orders(order_heads, 150) if order_heads else None
    check_codes(q, k, v, random_mask(1, 2, 2, 10), 128, 16, precision, backend, order)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order_heads", [0, 1])
def test_blocks_of_equal_keys_make_it_dense_attention(qkv, random_mask, order_heads, backend):
    """Where the keys of a block are one key, its mean with the weight of its count is exact, whatever v is."""
    q, k, v = qkv(1, 2, 150, 64)
    order = orders(order_heads, 150) if order_heads else torch.arange(150)[None]
    means = oracle_block_means(k, 16, order).float().repeat_interleave(16, dim=2)[:, :, :150]
    k = scatter_tokens(means, order, torch.empty_like(k))
    out, lse = block_sparse_attention(
        q, k, v, mask_to_lists(random_mask(1, 2, 3, 10, density=0.2), 64, 16),
        order=order if order_heads else None, skipped="summary", backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(lse, (q @ k.mT / 8).logsumexp(dim=-1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order_heads", [0, 2])
def test_rows_that_list_everything_are_those_of_drop(qkv, random_mask, exact_fp8, precision, order_heads, backend):
    q, k, v = qkv(1, 2, 150, 64, torch.float16)
    order = orders(order_heads, 150) if order_heads else None
    mask = random_mask(1, 1, 3, 5)
    mask[:, :, 1:] = True
    lists = mask_to_lists(mask, 64, 32)
    drop, whole = (
        block_sparse_attention(q, k, v, lists, precision=precision, order=order, skipped=how, backend=backend)
        for how in ("drop", "summary")
    )
    for one, other in zip(drop, whole, strict=True):
        one, other = (one, other) if order is None else (gather_tokens(one, order), gather_tokens(other, order))
        assert torch.equal(one[:, :, 64:], other[:, :, 64:])
        assert not torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_far_block_takes_over(qkv, backend):
    """With all listed scores at -50 and those of one skipped block at 50, out is that block's mean of v."""
    q, k, v = qkv(1, 1, 200, 64)
    q, k = torch.ones_like(q), torch.full_like(k, -1.0)
    k[:, :, 192:] = 1.0  # the ragged one, 8 tokens
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 1:] = False
    out, lse = block_sparse_attention(
        q, k, v, mask_to_lists(mask, 64, 64), scale=50 / 64, skipped="summary", backend=backend
    )
    torch.testing.assert_close(out, v[:, :, 192:].mean(2, keepdim=True).expand_as(out))
    torch.testing.assert_close(lse, torch.full((1, 1, 200), 50 + math.log(8)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_foreign_memory_is_never_read(qkv, random_mask, backend):
    """NaN behind the last token, and in what the allocator hands out, reaches no output."""
    q, k, v = (torch.full((1, 2, 192, 72), torch.nan) for _ in range(3))
    for x in (q, k, v):
        x[:, :, :150].normal_()
    q, k, v = (x[:, :, :150] for x in (q, k, v))
    lists = mask_to_lists(random_mask(1, 1, 2, 10), 128, 16)
    for _ in range(2):
        waste = [torch.full((2**size,), torch.nan) for size in range(8, 22)]
        del waste
        out, lse = block_sparse_attention(q, k, v, lists, skipped="summary", backend=backend)
        assert out.isfinite().all()
        assert lse.isfinite().all()


def test_unused_entries_of_a_list_are_never_read(qkv, random_mask):
    q, k, v = qkv(1, 1, 100, 64)
    lists = mask_to_lists(random_mask(1, 1, 2, 7), 64, 16)
    expected = [block_sparse_attention(q, k, v, lists, skipped="summary", backend=backend)[0] for backend in BACKENDS]
    lists.indices[lists.unused()] = 2**30
    for out, backend in zip(expected, BACKENDS, strict=True):
        assert torch.equal(block_sparse_attention(q, k, v, lists, skipped="summary", backend=backend)[0], out)


def test_many_more_blocks_than_are_looked_up_at_once(check_summary, qkv, random_mask):
    q, k, v = qkv(1, 1, 16, 64, seq_k=16 * 600 + 3)
    mask = random_mask(1, 1, 1, 601, density=0.1)
    mask[..., 64:256] = True  # three tiles without a skipped block
    mask[..., 512:600] = False
    for backend in BACKENDS:
        check_summary(q, k, v, mask, 16, 16, backend)


def test_the_host_works_a_bounded_part_at_a_time(check_summary, qkv, random_mask, monkeypatch):
    monkeypatch.setattr(summary, "SCORES", 2 * 2 * 32 * 10 * 3)
    q, k, v = qkv(2, 2, 310, 16)
    for order in (None, orders(2, 310)):
        check_summary(q, k, v, random_mask(1, 2, 10, 10), 32, 32, "host", order=order)


@pytest.mark.parametrize(("backend", "head_size"), [("host", 16), ("triton", 72)])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.integers(1, 2),
    seq=st.integers(1, 90),
    block_q=st.sampled_from([16, 64]),
    block_k=st.sampled_from([16, 32, 64]),
    ordered=st.booleans(),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_random_lists(
    check_summary, qkv, random_mask, backend, head_size, heads, seq, block_q, block_k, ordered, density, seed
):
    q, k, v = qkv(1, heads, seq, head_size)
    mask = random_mask(1, heads, blocks(seq, block_q), blocks(seq, block_k), density, seed)
    check_summary(q, k, v, mask, block_q, block_k, backend, order=orders(1, seq) if ordered else None)


def test_summaries_come_nearer_to_dense_attention_than_dropping(qkv, random_mask):
    """Keys that vary little inside blocks: their means stand for them."""
    q, k, v = qkv(1, 2, 512, 64)
    k = 0.3 * k + 3 * torch.randn(1, 2, 32, 64).repeat_interleave(16, dim=2)
    dense = F.scaled_dot_product_attention(q, k, v)
    lists = mask_to_lists(random_mask(1, 2, 8, 32, density=0.2), 64, 16)
    errors = [
        float((block_sparse_attention(q, k, v, lists, skipped=how)[0] - dense).norm() / dense.norm())
        for how in ("summary", "drop")
    ]
    assert errors[0] < 0.5 * errors[1]


def test_the_oracle_of_listed_blocks_alone_is_that_of_drop(qkv):
    q, k, v = (x.double() for x in qkv(1, 2, 100, 24))
    everything = torch.ones(1, 1, 4, 7, dtype=torch.bool)
    for one, other in zip(
        oracle_summary_attention(q, k, v, everything, 32, 16), oracle_attention(q, k, v, everything, 32, 16),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("backend", "precision"), [("host", "native"), ("triton", "native"), ("triton", "int8")])
@pytest.mark.parametrize("order_heads", [0, 2])
def test_opcheck(qkv, random_mask, backend, precision, order_heads):
    q, k, v = qkv(2, 2, 100, 64)
    order = orders(order_heads, 100) if order_heads else None
    lists = mask_to_lists(random_mask(1, 2, 2, 2), 64, 64)
    arguments = (q, k, v, lists.indices, lists.counts, order, 64, 64, 0.125, precision, backend, "summary")
    torch.library.opcheck(torch.ops.sparse_dit.block_sparse_attention.default, arguments)


def test_compiles_into_one_graph(qkv, random_mask):
    lists = mask_to_lists(random_mask(1, 1, 2, 7), 64, 16)

    def layer(q, k, v, lists):
        out, lse = block_sparse_attention(q * 2, k, v, lists, skipped="summary")
        return out + 1, lse

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = qkv(1, 2, 100, 16)
    torch.testing.assert_close(compiled(*inputs, lists), layer(*inputs, lists))


def test_an_unknown_treatment_is_refused(qkv, random_mask):
    q, k, v = qkv(1, 1, 64, 64)
    with pytest.raises(ValueError, match=r"^skipped: 'reuse'; valid: one of \('drop', 'summary'\)$"):
        block_sparse_attention(q, k, v, mask_to_lists(random_mask(1, 1, 1, 1), 64, 64), skipped="reuse")


@pytest.mark.gpu
class TestCuda:
    @pytest.fixture(autouse=True)
    def _poisoned(self):
        poison = torch.full((2**27,), torch.nan, device="cuda", dtype=torch.bfloat16)
        del poison  # what fresh memory will hold

    @pytest.mark.parametrize("seq", [1, 63, 64, 65, 127, 500, 1000, 2304])
    @pytest.mark.parametrize("order_heads", [0, 3])
    def test_lengths_and_orders(self, check_summary, qkv, random_mask, seq, order_heads):
        q, k, v = qkv(2, 3, seq, 64, torch.bfloat16, "cuda")
        order = orders(order_heads, seq, "cuda") if order_heads else None
        mask = random_mask(2, 3, blocks(seq, 64), blocks(seq, 16)).cuda()
        check_summary(q, k, v, mask, 64, 16, "triton", order=order)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("head_size", TRITON_HEAD_SIZES)
    @pytest.mark.parametrize(("block_q", "block_k"), [(16, 64), (64, 16), (128, 64), (128, 128)])
    def test_head_and_block_sizes(self, check_summary, qkv, random_mask, head_size, block_q, block_k, dtype):
        q, k, v = qkv(1, 2, 1000, head_size, dtype, "cuda")
        mask = random_mask(1, 2, blocks(1000, block_q), blocks(1000, block_k)).cuda()
        check_summary(q, k, v, mask, block_q, block_k, "triton")

    @pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
    @pytest.mark.parametrize("order_heads", [0, 2])
    def test_codes(self, check_codes, qkv, random_mask, precision, order_heads):
        q, k, v = qkv(1, 2, 2304, 128, torch.bfloat16, "cuda")
        order = orders(order_heads, 2304, "cuda") if order_heads else None
        check_codes(q, k, v, random_mask(1, 2, 18, 36).cuda(), 128, 64, precision, None, order)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_a_model_size_by_the_default_backend(self, check_summary, qkv, random_mask, dtype):
        q, k, v = qkv(1, 1, 17_776, 64, dtype, "cuda")
        mask = random_mask(1, 1, 139, 278, density=0.2).cuda()
        mask[..., -2:, :] = True
        check_summary(q, k, v, mask, 128, 64, None)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_rows_that_list_everything_are_those_of_drop(self, qkv, precision):
        q, k, v = qkv(1, 2, 1000, 128, torch.bfloat16, "cuda")
        lists = mask_to_lists(torch.ones(1, 1, 8, 16, dtype=torch.bool, device="cuda"), 128, 64)
        drop, whole = (
            block_sparse_attention(q, k, v, lists, precision=precision, skipped=how) for how in ("drop", "summary")
        )
        assert all(torch.equal(one, other) for one, other in zip(drop, whole, strict=True))

    def test_fp32_runs_on_the_host_backend(self, check_summary, qkv, random_mask):
        q, k, v = qkv(1, 2, 500, 64, torch.float32, "cuda")
        check_summary(q, k, v, random_mask(1, 1, 8, 32).cuda(), 64, 16, None)

    def test_a_call_does_not_wait_for_the_gpu(self, qkv, random_mask):
        q, k, v = qkv(1, 2, 500, 64, torch.bfloat16, "cuda")
        lists = mask_to_lists(random_mask(1, 1, 8, 8).cuda(), 64, 64)
        order = orders(1, 500, "cuda")
        block_sparse_attention(q, k, v, lists, order=order, skipped="summary")  # the first call compiles
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            block_sparse_attention(q, k, v, lists, order=order, skipped="summary")
        finally:
            torch.cuda.set_sync_debug_mode(before)
