"""Block means and similarity against the float64 oracle."""

import math

import pytest
import torch
from torch import Tensor

from sparse_dit.kernels.oracle_blocks import oracle_block_means, oracle_similarity
from sparse_dit.kernels.pool import block_means, block_similarity, token_means, torch_pool

BACKENDS = ["torch", "triton"]
RAGGED = [1, 63, 64, 65, 127, 500, 1000]
W = 2.0**-24  # unit roundoff of fp32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pool(backend: str, x: Tensor, block: int, order: Tensor | None = None, subtract: Tensor | None = None):
    if backend == "torch":
        return torch_pool(x, block, order, subtract, similarity=True)
    from sparse_dit.kernels.pool_triton import triton_pool

    return triton_pool(x, block, order, subtract, similarity=True)


def check(backend: str, x: Tensor, block: int, order: Tensor | None = None, subtract: Tensor | None = None):
    """Errors of n independent roundings grow like sqrt(n); 4 sqrt(n) holds but for one case in thousands.

    - A mean of n values: 4 sqrt(n) w, one w for the subtraction and one for the division, times the largest value.
    - A direction: 4 sqrt(D) w for its norm, 4 w for square root and division; the subtraction's error (w of the largest
      value in each of D channels) over the shortest norm. The mean of n of them: 4 sqrt(n) w more.
    - The square of that mean, of norm at most 1: twice its error, and 4 sqrt(D) w for the sum over channels.
    """
    means, similarity = pool(backend, x, block, order, subtract)
    assert means.dtype is similarity.dtype is torch.float32
    n, d = math.sqrt(block), math.sqrt(x.shape[-1])
    shifted = x.float() if subtract is None else x.float() - subtract.float()[:, :, None]
    largest = float(x.abs().max()) + float(shifted.abs().max())
    norms = shifted.norm(dim=-1)
    direction = (4 * d + 4 + (0 if subtract is None else largest * d / float(norms[norms > 0].min()))) * W
    torch.testing.assert_close(
        means.double(), oracle_block_means(x, block, order, subtract), atol=(4 * n + 2) * W * largest, rtol=0
    )
    torch.testing.assert_close(
        similarity.double(),
        oracle_similarity(x, block, order, subtract),
        atol=2 * (direction + 4 * n * W) + 4 * d * W,
        rtol=0,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seq", RAGGED)
def test_ragged_lengths(qkv, seq, backend):
    check(backend, qkv(1, 2, seq, 64)[0], 64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [1, 16, 50, 100, 400])
def test_any_block(qkv, block, backend):
    check(backend, qkv(1, 1, 110, 32)[0], block)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_size", [8, 72, 88, 96, 128, 256])
def test_head_sizes(qkv, head_size, backend):
    check(backend, qkv(2, 2, 100, head_size)[0], 64)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float16), ("torch", torch.bfloat16), ("triton", torch.float16)], ids=str
)
def test_sixteen_bits(qkv, backend, dtype):
    x = qkv(2, 2, 200, 64, dtype)[0]
    check(backend, x, 64, subtract=x.float().mean(dim=2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("subtracted", [False, True])
def test_orders(qkv, tables, subtracted, backend):
    x = qkv(2, 3, 150, 64)[0]
    order = torch.stack([torch.randperm(150, generator=torch.Generator().manual_seed(i)) for i in range(tables)])
    check(backend, x, 64, order, x.mean(dim=2) if subtracted else None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_order_may_leave_tokens_out(qkv, backend):
    x = qkv(1, 2, 150, 64)[0]
    x[:, :, 140:] = torch.nan
    check(backend, x[:, :, :140], 32, torch.arange(139, -1, -1)[None])
    means, similarity = pool(backend, x, 32, torch.arange(140)[None])
    assert means.isfinite().all()
    assert similarity.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_with_offsets_and_odd_strides(backend):
    memory = torch.randn(10_000 + 3 * 130 * 64 * 2)[10_000:]
    table = torch.randperm(260).view(130, 2).T % 130
    for x in (
        memory.view(3, 2, 130, 64)[1:2],
        memory.view(130, 3, 2, 64).permute(1, 2, 0, 3)[2:],
        memory.view(64, 2, 3, 130).permute(2, 1, 3, 0)[:1],
        memory[:64].expand(1, 2, 130, 64),
    ):
        check(backend, x, 32, table, memory[:128].view(1, 64, 2).mT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_foreign_memory_is_never_read(backend):
    x = torch.full((1, 1, 128, 48), torch.nan)
    x[:, :, :70, :24].normal_()
    check(backend, x[:, :, :70, :24], 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_planted_similarity(backend):
    """Rows of one direction are alike whatever their length, orthogonal ones by 1 / n, opposite ones not at all."""
    x = torch.zeros(1, 1, 4 * 16 + 3, 16)
    x[0, 0, :16, 3] = torch.rand(16) + 0.1
    x[0, 0, 16:32] = torch.eye(16) * 7
    x[0, 0, 32:48:2, 0], x[0, 0, 33:48:2, 0] = 1.0, -1.0
    x[0, 0, 64:] = 5.0  # after one block of zeros, which has no direction
    means, similarity = pool(backend, x, 16)
    torch.testing.assert_close(similarity, torch.tensor([[[1, 1 / 16, 0, 0, 1]]]))
    assert torch.equal(means[0, 0, 3], torch.zeros(16))
    torch.testing.assert_close(means[0, 0, 4], torch.full((16,), 5.0))


def test_means_are_those_of_similarity(qkv):
    x = qkv(1, 2, 100, 24)[0]
    means, similarity = block_similarity(x, 16)
    assert torch.equal(block_means(x, 16), means)
    assert similarity.shape == means.shape[:3]
    assert 0 <= similarity.min() <= similarity.max() <= 1 + 1e-6


X = torch.zeros(2, 3, 10, 8)


@pytest.mark.parametrize("tokens", [1, 511, 512, 1300])
def test_the_mean_of_all_tokens(tokens):
    x = torch.randn(2, tokens, 3, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE).transpose(1, 2)
    torch.testing.assert_close(token_means(x).double(), x.double().mean(dim=2), atol=tokens**0.5 * 2**-23, rtol=0)


@pytest.mark.parametrize(("tokens", "head_size"), [(1, 64), (32, 72), (33, 72), (129, 16), (1300, 64)])
def test_the_mean_of_means_of_blocks(tokens, head_size):
    """Of blocks of 4, of which a program takes 32 at a time; the last one may be shorter."""
    from sparse_dit.kernels.pool_triton import triton_mean_of_means

    x = torch.randn(2, 3, tokens, head_size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = triton_mean_of_means(block_means(x, 4), 4, tokens)
    torch.testing.assert_close(found.double(), x.double().mean(dim=2), atol=tokens**0.5 * 2**-23, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": X.double()},
            r"x: torch.float64 \[2, 3, 10, 8\]; valid: a non-empty \[B, H, S, D\] of torch.float16, .*",
        ),
        ({"x": X[:, :, :0]}, r"x: torch.float32 \[2, 3, 0, 8\]; valid: a non-empty \[B, H, S, D\] of .*"),
        ({"block": 0}, "block: 0; valid: at least 1 token"),
        (
            {"order": torch.zeros(2, 10, dtype=torch.int64)},
            r"order: .*; valid: torch.int64 \[1 or 3, tokens\], not empty",
        ),
        (
            {"order": torch.zeros(1, 10, dtype=torch.int32)},
            r"order: .*; valid: torch.int64 \[1 or 3, tokens\], not empty",
        ),
        ({"order": torch.zeros(1, 10, dtype=torch.int64, device="meta")}, "order: on meta; valid: cpu, where x is"),
        ({"subtract": X[:, :, 0, :4]}, r"subtract: .*; valid: floating point \[2, 3, 8\], by x"),
        ({"subtract": X[:, :, 0].to("meta")}, "subtract: on meta; valid: cpu, where x is"),
    ],
)
@pytest.mark.parametrize("function", [block_means, block_similarity])
def test_bad_arguments(function, change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        function(**{"x": X, "block": 4} | change)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("seq", "head_size", "block"), [(17_776, 64, 64), (5000, 128, 128), (777, 72, 1000)])
def test_on_the_gpu(qkv, dtype, seq, head_size, block):
    x = qkv(2, 3, seq, head_size, dtype, "cuda")[0]
    order = torch.stack([torch.randperm(seq, device="cuda") for _ in range(3)])
    for table, vector in ((None, None), (order, x.float().mean(dim=2))):
        check("triton", x, block, table, vector)
        assert torch.equal(
            block_means(x, block, order=table, subtract=vector),
            block_means(x.contiguous(), block, order=table, subtract=vector),
        )


@pytest.mark.gpu
def test_a_call_does_not_wait_for_the_gpu(qkv):
    x = qkv(1, 2, 500, 64, torch.bfloat16, "cuda")[0]
    order = torch.arange(500, device="cuda")[None]
    block_similarity(x, 64, order=order)  # the first call compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_similarity(x, 64, order=order)
    finally:
        torch.cuda.set_sync_debug_mode(before)
