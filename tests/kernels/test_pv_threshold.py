"""Value products that `pv_threshold` leaves out: which ones, what of them is kept, how far the output moves."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.ops import PRECISIONS, block_sparse_attention
from sparse_dit.kernels.oracle import oracle_attention, oracle_skipping_attention

BACKENDS = ["host", "triton"]


def blocks(seq, block):
    return math.ceil(seq / block)


def planted(seq=256, head_size=64, block=64, low=-30.0, dtype=torch.float32, device="cpu"):
    """Scores of 0 in the first block and of `low` behind it, NaN values behind it. q.k is exact in any dtype."""
    q, k = torch.zeros(2, 1, 1, seq, head_size, dtype=dtype, device=device)
    q[..., 0], k[:, :, block:, 0] = 1.0, low
    v = torch.randn(1, 1, seq, head_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    v[:, :, block:] = torch.nan
    return q, k, v


def everything(seq, block_q, block_k, device="cpu"):
    return torch.ones(1, 1, blocks(seq, block_q), blocks(seq, block_k), dtype=torch.bool, device=device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seq", [256, 230])
def test_what_is_left_out_is_not_multiplied(seq, backend):
    """Values of NaN in the blocks left out reach no output; their weights stay in the sum."""
    q, k, v = planted(seq)
    lists = mask_to_lists(everything(seq, 64, 64), 64, 64)
    out, lse = block_sparse_attention(q, k, v, lists, scale=1.0, pv_threshold=29.0, backend=backend)
    total = 64 + (seq - 64) * math.exp(-30)
    torch.testing.assert_close(out, (v[:, :, :64].sum(dim=2, keepdim=True) / total).expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(total)))
    for taken in ({"pv_threshold": 31.0}, {}):
        assert block_sparse_attention(q, k, v, lists, scale=1.0, backend=backend, **taken)[0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_that_needs_a_tile_takes_it_for_its_group(backend):
    q, k, v = planted()
    v = v.nan_to_num(1e12)
    q[:, :, 70, 0] = 0.0  # sees all keys alike
    lists = mask_to_lists(everything(256, 64, 64), 64, 64)
    out, _ = block_sparse_attention(q, k, v, lists, scale=1.0, pv_threshold=29.0, backend=backend)
    exact, _ = oracle_attention(q, k, v, everything(256, 64, 64), 64, 64, 1.0)
    torch.testing.assert_close(out.double()[:, :, 64:128], exact[:, :, 64:128], rtol=1e-3, atol=0)
    assert float((out[:, :, 71] - out[:, :, 0]).min()) > 0.1  # its neighbours take the 3e-13 of it, too


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_larger_tile_later_leaves_earlier_ones_in(backend):
    """The maximum so far counts, not the last: with scores that rise, nothing is left out."""
    q, k, v = planted()
    v = v.nan_to_num(1.0)
    k[..., 0] = torch.arange(4).repeat_interleave(64) * 40.0 - 120.0
    lists = mask_to_lists(everything(256, 64, 64), 64, 64)
    skipping = block_sparse_attention(q, k, v, lists, scale=1.0, pv_threshold=1.0, backend=backend)[0]
    torch.testing.assert_close(skipping, v[:, :, 192:].mean(dim=2, keepdim=True).expand_as(skipping))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "heads", "seq", "lists"), [(1, 1, 200, (1, 1)), (2, 2, 333, (1, 2))])
def test_the_oracle_leaves_the_same_out(qkv, random_mask, batch, heads, seq, lists, backend):
    q, k, v = qkv(batch, heads, seq, 64)
    # Levels of blocks, added to all of their scores.
    level = torch.rand(blocks(seq, 32), generator=torch.Generator().manual_seed(seq)) * 25
    q[..., 0], k[..., 0] = 8.0, level.repeat_interleave(32)[:seq]
    mask = random_mask(*lists, blocks(seq, 32), blocks(seq, 32), density=0.7)
    out, lse = block_sparse_attention(q, k, v, mask_to_lists(mask, 32, 32), pv_threshold=6.0, backend=backend)
    expected, expected_lse, left_out = oracle_skipping_attention(q, k, v, mask, 32, 32, (32, 32), 6.0)
    assert 0.1 < left_out.sum() / (mask.expand(batch, heads, -1, -1).sum() * 32**2) < 0.9
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=0)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seq=st.integers(1, 200),
    block_q=st.sampled_from([16, 64]),
    block_k=st.sampled_from([16, 64]),
    threshold=st.floats(0.1, 12),
    sharp=st.floats(0.5, 6),
    precision=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 2**20),
)
def test_the_output_moves_within_its_bound(qkv, random_mask, seq, block_q, block_k, threshold, sharp, precision, seed):
    q, k, v = qkv(1, 2, seq, 16)
    q = q * sharp
    lists = mask_to_lists(random_mask(1, 2, blocks(seq, block_q), blocks(seq, block_k), 0.7, seed), block_q, block_k)
    out, lse = block_sparse_attention(q, k, v, lists, precision=precision, pv_threshold=threshold)
    whole, whole_lse = block_sparse_attention(q, k, v, lists, precision=precision)
    bound = (2 if precision == "int8_fp8" else 1) * seq * math.exp(-threshold) * float(v.abs().max())
    assert float((out - whole).abs().max()) <= bound + 1e-4
    torch.testing.assert_close(lse, whole_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.inf, math.nan])
def test_bad_thresholds(qkv, threshold):
    q, k, v = qkv(1, 1, 64, 16)
    lists = mask_to_lists(everything(64, 64, 64), 64, 64)
    with pytest.raises(ValueError, match=f"^pv_threshold: {threshold}; valid: a positive finite number, or None"):
        block_sparse_attention(q, k, v, lists, pv_threshold=threshold)


def test_summaries_order_and_compilation_go_with_it(qkv, random_mask):
    q, k, v = qkv(1, 2, 200, 16)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))[None]
    lists = mask_to_lists(random_mask(1, 2, 4, 4), 64, 64)
    settings = {"order": order, "skipped": "summary"}
    out, lse = block_sparse_attention(q, k, v, lists, pv_threshold=40.0, **settings)
    expected, expected_lse = block_sparse_attention(q, k, v, lists, **settings)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=0)
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, lists, pv_threshold=40.0, **settings)[0], out)


@pytest.mark.gpu
class TestCuda:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("seq", [256, 230, 1000])
    @pytest.mark.parametrize("head_size", [64, 96, 128])
    def test_what_is_left_out_is_not_multiplied(self, seq, head_size, precision):
        q, k, v = planted(seq, head_size, dtype=torch.bfloat16, device="cuda")
        if precision == "int8_fp8":
            v = v.nan_to_num(1.0)  # NaN would be in the mean that is subtracted
        lists = mask_to_lists(everything(seq, 64, 64, "cuda"), 64, 64)
        out, lse = block_sparse_attention(q, k, v, lists, scale=1.0, precision=precision, pv_threshold=28.0)
        exact = v.float()[:, :, :64].mean(dim=2, keepdim=True).expand_as(out)
        torch.testing.assert_close(out.float(), exact, atol=0.05 if precision == "int8_fp8" else 4e-3, rtol=0)
        torch.testing.assert_close(
            lse, torch.full_like(lse, math.log(64)), atol=0.3 if precision != "native" else 1e-4, rtol=0
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("head_size", "seq", "block"), [(64, 1000, 64), (72, 500, 64), (96, 1000, 32), (128, 1000, 64)]
    )
    def test_the_oracle_leaves_the_same_out(self, qkv, random_mask, head_size, seq, block, dtype):
        q, k, v = qkv(1, 2, seq, head_size, dtype, "cuda")
        level = torch.rand(blocks(seq, block), generator=torch.Generator().manual_seed(seq)) * 25
        q[..., 0], k[..., 0] = head_size**0.5, level.repeat_interleave(block)[:seq].cuda()
        mask = random_mask(1, 2, blocks(seq, block), blocks(seq, block), density=0.7).cuda()
        lists = mask_to_lists(mask, block, block)
        out, lse = block_sparse_attention(q, k, v, lists, pv_threshold=6.0, backend="triton")
        expected, expected_lse, left_out = oracle_skipping_attention(q, k, v, mask, block, block, (block, block), 6.0)
        assert 0.1 < left_out.sum() / (mask.sum() * block**2) < 0.9
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=0)
        # A tile on the threshold may fall on the other side: then out moves by the weight of a tile.
        bound = block * math.exp(-6.0) * float(v.abs().max())
        assert float((out - expected).abs().max()) < bound + 0.05
        assert float((out - expected).abs().mean()) < 2e-3
