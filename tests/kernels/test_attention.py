"""Every backend against the float64 oracle."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_dit.kernels.backends import TRITON_HEAD_SIZES
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.kernels.oracle import oracle_attention

BACKENDS = ["host", "triton"]
RAGGED = [1, 63, 64, 65, 127, 500, 1000]


def blocks(seq, block):
    return math.ceil(seq / block)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seq", RAGGED)
def test_ragged_lengths(check, qkv, random_mask, seq, backend):
    q, k, v = qkv(1, 1, seq, 64)
    check(q, k, v, random_mask(1, 1, blocks(seq, 64), blocks(seq, 64)), 64, 64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_size", TRITON_HEAD_SIZES)
def test_head_sizes(check, qkv, random_mask, head_size, backend):
    q, k, v = qkv(1, 2, 150, head_size)
    check(q, k, v, random_mask(1, 1, 3, 3), 64, 64, backend)


@pytest.mark.parametrize("head_size", [1, 8, 12, 16, 80, 320])
def test_any_head_size_on_the_host(check, qkv, random_mask, head_size):
    q, k, v = qkv(2, 2, 150, head_size)
    check(q, k, v, random_mask(1, 1, 3, 3), 64, 64, "host")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lists", [(1, 1), (1, 3), (2, 1), (2, 3)], ids=lambda x: f"lists-{x[0]}x{x[1]}")
def test_lists_shared_and_per_head(check, qkv, random_mask, lists, backend):
    q, k, v = qkv(2, 3, 130, 64)
    check(q, k, v, random_mask(*lists, blocks(130, 32), blocks(130, 64)), 32, 64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (16, 128), (32, 64), (64, 32), (128, 16), (128, 128)])
def test_block_sizes(check, qkv, random_mask, block_q, block_k, backend):
    q, k, v = qkv(1, 1, 300, 64)
    check(q, k, v, random_mask(1, 1, blocks(300, block_q), blocks(300, block_k)), block_q, block_k, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_keys_than_queries(check, qkv, random_mask, backend):
    q, k, v = qkv(1, 2, 70, 64, seq_k=300)
    check(q, k, v, random_mask(1, 2, 2, 5), 64, 64, backend, scale=0.3)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("host", torch.float16), ("host", torch.bfloat16), ("triton", torch.float16)],
    ids=str,
)
def test_sixteen_bits(check, qkv, random_mask, backend, dtype):
    q, k, v = qkv(2, 2, 200, 72, dtype)
    check(q, k, v, random_mask(1, 2, 4, 4), 64, 64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_with_offsets_and_odd_strides(check, random_mask, backend):
    heads_first, tokens_first, dims_first = (torch.randn(10_000 + 3 * 130 * 64 * 2)[10_000:] for _ in range(3))
    q = heads_first.view(3, 2, 130, 64)[1:2]
    k = tokens_first.view(130, 3, 2, 64).permute(1, 2, 0, 3)[2:]  # as a fused qkv projection leaves it
    v = dims_first.view(64, 2, 3, 130).permute(2, 1, 3, 0)[:1]  # even the head dimension strided
    check(q, k, v, random_mask(1, 1, 3, 3), 64, 64, backend)


def test_only_rows_out_of_line_are_copied():
    from sparse_dit.kernels.pieces import aligned, pieces

    memory = torch.zeros(2, 40, 3, 80, dtype=torch.float16)
    heads = memory[..., 8:].transpose(1, 2)
    assert aligned(heads) is heads
    assert pieces(heads) == [1200, 10, 30]
    single = memory[:1, ..., 8:].as_strided((1, 3, 40, 72), (7, 80, 240, 1), 8)  # no entry lies at the odd stride
    assert aligned(single) is single
    for odd in (memory[..., 4:76], memory[..., ::2], memory[..., 1:], torch.zeros(2, 3, 76, dtype=torch.float16)):
        copy = aligned(odd)
        assert copy.is_contiguous()
        assert copy.data_ptr() != odd.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_heads(check, random_mask, backend):
    q, k, v = (torch.randn(1, 1, 130, 64).expand(2, 3, 130, 64) for _ in range(3))
    check(q, k, v, random_mask(1, 3, 3, 3), 64, 64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_rows_see_everything(check, qkv, random_mask, backend):
    q, k, v = qkv(1, 2, 333, 64)
    mask = random_mask(1, 1, 6, 6, density=0.2)
    mask[..., -2:, :] = True  # text queries see all keys
    mask[..., -2:] = True  # all queries see the text, the ragged block included
    check(q, k, v, mask, 64, 64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_ragged_block(check, qkv, backend):
    q, k, v = qkv(1, 1, 130, 64)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 2] = True
    check(q, k, v, mask, 64, 64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seq", [128, 100])
def test_density_one_is_sdpa(qkv, backend, seq):
    q, k, v = qkv(1, 2, seq, 64)
    everything = mask_to_lists(torch.ones(1, 1, blocks(seq, 64), blocks(seq, 64), dtype=torch.bool), 64, 64)
    out, lse = block_sparse_attention(q, k, v, everything, backend=backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(lse, (q @ k.mT / 8).logsumexp(dim=-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_block_holds_all_the_mass(qkv, backend):
    """With scores of +-50, attention is the mean of V over the planted block if it is listed."""
    q, k, v = qkv(1, 1, 256, 64)
    q, k = torch.ones_like(q), torch.full_like(k, -1.0)
    k[:, :, 64:128] = 1.0
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)[None, None]
    out, lse = block_sparse_attention(q, k, v, mask_to_lists(mask, 64, 64), scale=50 / 64, backend=backend)
    torch.testing.assert_close(out[:, :, :128], v[:, :, 64:128].mean(2, keepdim=True).expand(-1, -1, 128, -1))
    torch.testing.assert_close(lse[:, :, :128], torch.full((1, 1, 128), 50 + math.log(64)))
    rest = torch.cat((v[:, :, :64], v[:, :, 128:]), dim=2)
    torch.testing.assert_close(out[:, :, 128:192], rest.mean(2, keepdim=True).expand(-1, -1, 64, -1))
    torch.testing.assert_close(lse[:, :, 128:192], torch.full((1, 1, 64), -50 + math.log(192)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unlisted_blocks_and_foreign_memory_are_never_read(qkv, backend):
    """NaN in every block that is not listed, and behind the last token, reaches no output."""
    mask = torch.tensor([[1, 0, 1], [1, 0, 1], [0, 0, 1]], dtype=torch.bool)[None, None]
    q, k, v = (torch.full((1, 1, 192, 64), torch.nan) for _ in range(3))
    for x in (q, k, v):
        x[:, :, :64].normal_()
        x[:, :, 128:150].normal_()
    q[:, :, 64:128].normal_()
    q, k, v = (x[:, :, :150] for x in (q, k, v))
    out, lse = block_sparse_attention(q, k, v, mask_to_lists(mask, 64, 64), backend=backend)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(check, qkv, random_mask, backend):
    q, k, v = qkv(1, 1, 130, 64)
    check(q * 30, k * 30, v, random_mask(1, 1, 3, 3), 64, 64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_memory_is_tokens_first(qkv, random_mask, backend):
    q, k, v = qkv(2, 3, 130, 64)
    out, lse = block_sparse_attention(q, k, v, mask_to_lists(random_mask(2, 3, 3, 3), 64, 64), backend=backend)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    seq=st.integers(1, 200),
    block_q=st.sampled_from([16, 32, 64]),
    block_k=st.sampled_from([16, 32, 64]),
    shared=st.tuples(st.booleans(), st.booleans()),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_random_lists_on_the_host(check, qkv, random_mask, batch, heads, seq, block_q, block_k, shared, density, seed):
    lists = (1 if shared[0] else batch, 1 if shared[1] else heads)
    q, k, v = qkv(batch, heads, seq, 16)
    mask = random_mask(*lists, blocks(seq, block_q), blocks(seq, block_k), density, seed)
    check(q, k, v, mask, block_q, block_k, "host")


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seq=st.integers(1, 100),
    head_size=st.sampled_from([64, 72]),
    block_q=st.sampled_from([16, 64]),
    block_k=st.sampled_from([16, 64]),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_random_lists_in_triton(check, qkv, random_mask, seq, head_size, block_q, block_k, density, seed):
    q, k, v = qkv(1, 1, seq, head_size)
    mask = random_mask(1, 1, blocks(seq, block_q), blocks(seq, block_k), density, seed)
    check(q, k, v, mask, block_q, block_k, "triton")


def test_the_oracle_is_masked_sdpa(qkv, random_mask):
    q, k, v = (x.double() for x in qkv(2, 2, 100, 24))
    mask = random_mask(1, 2, 4, 7)
    out, lse = oracle_attention(q, k, v, mask, 32, 16)
    dense = torch.zeros(1, 2, 100, 100, dtype=torch.bool)
    for i in range(100):
        for j in range(100):
            dense[:, :, i, j] = mask[:, :, i // 32, j // 16]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=dense))
    scores = (q @ k.mT / 24**0.5).masked_fill(~dense, -torch.inf)
    torch.testing.assert_close(lse, scores.exp().sum(-1).log())


@pytest.mark.gpu
class TestCuda:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("head_size", TRITON_HEAD_SIZES)
    @pytest.mark.parametrize("seq", [500, 512])
    def test_head_sizes(self, check, qkv, random_mask, seq, head_size, dtype):
        q, k, v = qkv(2, 3, seq, head_size, dtype, "cuda")
        check(q, k, v, random_mask(1, 1, blocks(seq, 64), blocks(seq, 64)).cuda(), 64, 64, "triton")

    @pytest.mark.parametrize("seq", RAGGED)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_ragged_lengths(self, check, qkv, random_mask, seq, backend):
        q, k, v = qkv(2, 2, seq, 64, torch.bfloat16, "cuda")
        check(q, k, v, random_mask(2, 2, blocks(seq, 64), blocks(seq, 64)).cuda(), 64, 64, backend)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("block_k", [16, 32, 64, 128])
    @pytest.mark.parametrize("block_q", [16, 32, 64, 128])
    def test_block_sizes(self, check, qkv, random_mask, block_q, block_k, dtype):
        q, k, v = qkv(1, 2, 1000, 128, dtype, "cuda")
        check(
            q, k, v, random_mask(1, 2, blocks(1000, block_q), blocks(1000, block_k)).cuda(), block_q, block_k, "triton"
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("batch", "heads", "seq"), [(2, 4, 2304), (1, 1, 17_776)])
    @pytest.mark.parametrize("block", [64, 128])
    def test_model_sizes(self, check, qkv, random_mask, batch, heads, seq, block, dtype):
        q, k, v = qkv(batch, heads, seq, 64, dtype, "cuda")
        mask = random_mask(1, 1, blocks(seq, block), blocks(seq, block), density=0.25).cuda()
        mask[..., -2:, :] = True
        check(q, k, v, mask, block, block, "triton")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_density_one_is_sdpa(self, qkv, dtype):
        q, k, v = qkv(1, 4, 2304, 64, dtype, "cuda")
        everything = mask_to_lists(torch.ones(1, 1, 36, 36, dtype=torch.bool, device="cuda"), 64, 64)
        out, _ = block_sparse_attention(q, k, v, everything)
        # Both round weights and output to the dtype: two roundings each.
        atol = 2 * torch.finfo(dtype).eps * float(v.abs().max())
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=atol, rtol=0)

    def test_views_with_offsets(self, check, random_mask):
        qkv = torch.randn(2, 333, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
        q, k, v = (qkv[:, 33:, i].transpose(1, 2) for i in range(3))
        check(q, k, v, random_mask(1, 1, 5, 5).cuda(), 64, 64, "triton")

    @pytest.mark.parametrize("head_size", [72, 88])
    def test_rows_that_start_between_pieces_of_16_bytes(self, check, random_mask, head_size):
        memory = torch.randn(3, 1, 2, 333, head_size + 1, device="cuda", dtype=torch.bfloat16)
        check(*memory[..., 1:], random_mask(1, 1, 6, 6).cuda(), 64, 64, "triton")

    def test_offsets_beyond_two_gigabytes(self, check, random_mask):
        memory = torch.randn(130, 2**25 // 64, 64, device="cuda", dtype=torch.bfloat16)  # tokens 2^25 elements apart
        last = memory.shape[1] - 1
        q, k, v = (memory[:, i : i + 1].transpose(0, 1)[None] for i in (0, 1, last))
        check(q, k, v, random_mask(1, 1, 3, 3).cuda(), 64, 64, "triton")

    def test_fp32_runs_on_the_host_backend_and_is_refused_by_triton(self, check, qkv, random_mask):
        q, k, v = qkv(1, 2, 500, 64, torch.float32, "cuda")
        mask = random_mask(1, 1, 8, 8).cuda()
        check(q, k, v, mask, 64, 64, None)
        with pytest.raises(ValueError, match=r"^q: torch.float32; valid for backend 'triton' on CUDA: one of "):
            block_sparse_attention(q, k, v, mask_to_lists(mask, 64, 64), backend="triton")
