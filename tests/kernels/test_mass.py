"""Block mass against the float64 oracle."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_dit.kernels.backends import TRITON_HEAD_SIZES
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.mass import block_mass, torch_mass
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.kernels.oracle_blocks import oracle_block_mass

BACKENDS = ["torch", "triton"]
RAGGED = [1, 63, 64, 65, 127, 500, 1000]


def dense_lse(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    scores = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.logsumexp(dim=-1).float()


def mass(backend: str, q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, scale: float | None = None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "torch":
        return torch_mass(q, k, lse, block_q, block_k, scale)
    from sparse_dit.kernels.mass_triton import triton_mass

    return triton_mass(q, k, lse, block_q, block_k, scale)


def relative_error(q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int) -> float:
    """How far a mass may be off, as a fraction of itself: it is a sum of positive weights that are off by as much.

    w is the unit roundoff of fp32, or 2^-22 where tensor cores sum and ex2.approx computes the exponential. A score is
    off by 4 sqrt(D) w of its size |q| |k| / sqrt(D), scaling and subtracting lse by w of what is subtracted each; the
    exponential by 4 w, the sum of n weights by 4 sqrt(n) w.
    """
    w = 2.0**-22 if q.is_cuda else 2.0**-24
    size = q.shape[-1] ** -0.5 * float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max())
    score = (4 * math.sqrt(q.shape[-1]) + 3) * w * size + 3 * w * float(lse.abs().max())
    return score + 4 * w + 4 * math.sqrt(block_q * block_k) * w


def check(backend: str, q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int):
    measured = mass(backend, q, k, lse, block_q, block_k)
    expected = oracle_block_mass(q, k, lse, block_q, block_k)
    assert measured.dtype is torch.float32
    # Weights below fp32's normal range may be flushed to zero.
    smallest = 2.0**-126 * block_k
    torch.testing.assert_close(
        measured.double(), expected, rtol=relative_error(q, k, lse, block_q, block_k), atol=smallest
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seq", RAGGED)
def test_rows_sum_to_one_with_the_true_lse(qkv, seq, backend):
    q, k, _ = qkv(1, 1, seq, 64)
    lse = dense_lse(q, k)
    check(backend, q, k, lse, 64, 64)
    rows = mass(backend, q, k, lse, 64, 64).sum(dim=-1)
    tolerance = relative_error(q, k, lse, 64, seq) + float(lse.abs().max()) * 2.0**-24  # lse itself is rounded
    torch.testing.assert_close(rows, torch.ones_like(rows), atol=tolerance, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_size", TRITON_HEAD_SIZES)
def test_head_sizes(qkv, head_size, backend):
    q, k, _ = qkv(1, 2, 150, head_size)
    check(backend, q, k, dense_lse(q, k), 64, 64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_size", [64, 256])  # tiles larger and smaller than a block
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (16, 128), (32, 64), (128, 64), (128, 128)])
def test_block_sizes(qkv, head_size, block_q, block_k, backend):
    q, k, _ = qkv(1, 1, 200, head_size, seq_k=300)
    check(backend, q, k, dense_lse(q, k), block_q, block_k)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float16), ("torch", torch.bfloat16), ("triton", torch.float16)], ids=str
)
def test_sixteen_bits(qkv, backend, dtype):
    q, k, _ = qkv(2, 2, 150, 72, dtype)
    check(backend, q, k, dense_lse(q, k), 64, 32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_older_lse_is_used_as_it_is(qkv, backend):
    q, k, _ = qkv(2, 1, 130, 64)
    lse = dense_lse(q, k)
    older = lse + torch.linspace(-3, 3, 130)
    check(backend, q, k, older, 64, 64)
    exact, stale = (mass(backend, q, k, x, 16, 64) for x in (lse, lse + math.log(2)))
    torch.testing.assert_close(stale * 2, exact, rtol=relative_error(q, k, lse, 16, 64), atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_with_offsets_and_odd_strides(backend):
    memory = torch.randn(2, 10_000 + 3 * 130 * 64 * 2)[:, 10_000:]
    q = memory[0].view(130, 3, 2, 64).permute(1, 2, 0, 3)[2:]
    k = memory[1].view(64, 2, 3, 130).permute(2, 1, 3, 0)[:1]  # even the head dimension strided
    lse = torch.stack((dense_lse(q, k), torch.full((1, 2, 130), torch.nan)), dim=-1)[..., 0]
    check(backend, q, k, lse, 64, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_foreign_memory_is_never_read(backend):
    q, k = torch.full((2, 1, 1, 192, 96), torch.nan)
    q[:, :, :70, :64].normal_()
    k[:, :, :150, :64].normal_()
    q, k = q[:, :, :70, :64], k[:, :, :150, :64]
    lse = torch.full((1, 1, 192), torch.nan)
    lse[:, :, :70] = dense_lse(q, k)
    check(backend, q, k, lse[:, :, :70], 64, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_planted_blocks_take_the_mass(backend):
    """With scores of +-50, each query block sees one key block; half of the last one's rows see another."""
    directions = torch.eye(64)
    home = torch.arange(256) // 64
    k = directions[home][None, None]
    q = directions[home.flip(0)].clone()
    q[-32:] = directions[3]
    q = (q * 2 - directions[:4].sum(0))[None, None]
    expected = torch.eye(4).flip(0)
    expected[3] = torch.tensor([0.5, 0, 0, 0.5])
    measured = mass(backend, q, k, dense_lse(q, k, 50.0), 64, 64, scale=50.0)
    torch.testing.assert_close(measured, expected[None, None], rtol=1e-4, atol=1e-30)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seq_q=st.integers(1, 150),
    seq_k=st.integers(1, 150),
    head_size=st.sampled_from([64, 72]),
    block_q=st.sampled_from([16, 64]),
    block_k=st.sampled_from([32, 64]),
    backend=st.sampled_from(BACKENDS),
)
def test_any_lengths(qkv, seq_q, seq_k, head_size, block_q, block_k, backend):
    q, k, _ = qkv(1, 2, seq_q, head_size, seq_k=seq_k)
    check(backend, q, k, dense_lse(q, k), block_q, block_k)


def test_scores_are_held_a_part_at_a_time(qkv, monkeypatch):
    q, k, _ = qkv(2, 2, 150, 16)
    lse = dense_lse(q, k)
    whole = block_mass(q, k, lse, 32, 32)
    monkeypatch.setattr("sparse_dit.kernels.mass.SCORES", 1)
    torch.testing.assert_close(block_mass(q, k, lse, 32, 32), whole)


def test_the_lse_is_that_of_attention(qkv):
    q, k, v = qkv(1, 2, 150, 24)
    everything = mask_to_lists(torch.ones(1, 1, 3, 3, dtype=torch.bool), 64, 64)
    _, lse = block_sparse_attention(q, k, v, everything, scale=0.3)
    rows = block_mass(q, k, lse, 64, 64, scale=0.3).sum(dim=-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


Q, LSE = torch.zeros(2, 3, 100, 64), torch.zeros(2, 3, 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q.double()}, r"q: torch.float64 \[2, 3, 100, 64\]; valid: a non-empty \[B, H, S, D\] of .*"),
        ({"q": Q[:, :, :0]}, r"q: torch.float32 \[2, 3, 0, 64\]; valid: a non-empty \[B, H, S, D\] of .*"),
        ({"k": Q.half()}, r"k: torch.float16 .*; valid: torch.float32 \[2, 3, tokens, 64\] on cpu, like q"),
        ({"k": Q[:, :2]}, r"k: .* \[2, 2, 100, 64\] on cpu; valid: torch.float32 \[2, 3, tokens, 64\] on cpu, like q"),
        ({"k": Q[:, :, :0]}, r"k: .* \[2, 3, 0, 64\] on cpu; valid: torch.float32 \[2, 3, tokens, 64\] on cpu, like q"),
        ({"lse": LSE.double()}, r"lse: torch.float64 .*; valid: torch.float32 \[2, 3, 100\] on cpu, by the shape of q"),
        (
            {"lse": LSE[..., :99]},
            r"lse: .* \[2, 3, 99\] .*; valid: torch.float32 \[2, 3, 100\] on cpu, by the shape .*",
        ),
        ({"block_q": 48}, r"block_q: 48; valid: one of \(16, 32, 64, 128\)"),
        ({"block_k": 0}, r"block_k: 0; valid: one of \(16, 32, 64, 128\)"),
        ({"scale": -1.0}, r"scale: -1.0; valid: a positive finite number, or None for 1 / sqrt\(D\)"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        block_mass(**{"q": Q, "k": Q, "lse": LSE, "block_q": 64, "block_k": 64} | change)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", TRITON_HEAD_SIZES)
@pytest.mark.parametrize(
    ("seq", "block_q", "block_k"), [(1000, 64, 64), (4096, 128, 64), (2304, 128, 128), (65, 16, 32)]
)
def test_on_the_gpu(qkv, dtype, head_size, seq, block_q, block_k):
    q, k, _ = qkv(1, 2, seq, head_size, dtype, "cuda")
    lse = dense_lse(q, k)
    expected = oracle_block_mass(q, k, lse, block_q, block_k)
    measured = block_mass(q, k, lse, block_q, block_k)
    torch.testing.assert_close(
        measured.double(), expected, rtol=relative_error(q, k, lse, block_q, block_k), atol=2.0**-126 * block_k
    )


@pytest.mark.gpu
def test_a_head_size_without_a_kernel_is_an_error(qkv):
    q, k, _ = qkv(1, 1, 100, 80, torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match=r"^q: head size 80; valid on CUDA in 16 bits: one of .*$"):
        block_mass(q, k, torch.zeros(1, 1, 100, device="cuda"), 64, 64)


@pytest.mark.gpu
def test_a_call_does_not_wait_for_the_gpu(qkv):
    q, k, _ = qkv(1, 2, 500, 64, torch.bfloat16, "cuda")
    lse = dense_lse(q, k)
    block_mass(q, k, lse, 64, 64)  # the first call compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_mass(q, k, lse, 64, 64)
    finally:
        torch.cuda.set_sync_debug_mode(before)
