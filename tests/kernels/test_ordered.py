"""Tokens into the order of blocks and the means of their runs in one pass: against moving first and float64 means."""

import pytest
import torch
from torch import Tensor

from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.ordered import UNITS, order_with_means
from sparse_dit.kernels.ordered_triton import triton_order_with_means

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def orders(heads: int, seq: int, seed: int = 0, device: str = DEVICE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(seq, generator=generator) for _ in range(heads)]).to(device)


def check(tensors: list[Tensor], q_order: Tensor, k_order: Tensor, units: tuple[int, int], parts: bool) -> None:
    moved, q_means, k_means = triton_order_with_means(*tensors, q_order, k_order, units, parts=parts)
    expected = [gather_tokens(x, order) for x, order in zip(tensors, (q_order, k_order, k_order), strict=True)]
    for found, exact in zip(moved, expected, strict=True):
        assert torch.equal(found, exact)
        assert found.transpose(1, 2).is_contiguous()
    for means, tokens, unit in zip((q_means, k_means), expected, units, strict=False):
        exact = torch.stack([run.double().mean(dim=2) for run in tokens.split(unit, dim=2)], dim=2)
        dtype = tokens.dtype if parts else torch.float32
        assert means.dtype is dtype
        # Sums of at most 128 numbers below 5 in fp32, and one rounding to the dtype of parts.
        rounded = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(means.double(), exact, atol=128 * 5 * 2**-24, rtol=rounded)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("seq", "head_size", "units", "parts"),
    [
        (1, 64, (16, 16), True),
        (130, 72, (128, 64), False),
        (301, 128, (16, 4), True),
        (257, 64, (8, 128), False),
        (140, 256, (128, 32), False),
    ],
)
def test_tokens_are_in_order_and_runs_have_their_means(qkv, seq, head_size, units, parts, shared) -> None:
    heads = 1 if shared else 2
    tensors = qkv(2, 2, seq, head_size, torch.float16)
    check([x.to(DEVICE) for x in tensors], orders(heads, seq), orders(heads, seq, 1), units, parts)


def test_any_strides() -> None:
    """Heads first, a slice of a fused projection, rows between pieces of 16 bytes, channels apart."""
    seq, order = 50, orders(1, 50)
    fused = torch.randn(2, seq, 3, 2, 64, device=DEVICE)
    check([fused[:, :, i].transpose(1, 2) for i in range(3)], order, order, (16, 8), False)
    apart = torch.randn(2, 2, 64, seq, device=DEVICE).transpose(2, 3)
    check([torch.randn(2, 2, seq, 64, device=DEVICE), torch.randn(2, 2, seq + 9, 64, device=DEVICE)[:, :, 9:], apart],
          order, order, (32, 16), True)  # fmt: skip


@pytest.mark.parametrize("parts", [True, False])
def test_the_torch_path_takes_any_run(parts: bool) -> None:
    q, k, v = (torch.randn(1, 3, 37, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    q_order, k_order = orders(3, 37, device="cpu"), orders(1, 37, 1, device="cpu")
    tokens, q_means, k_means = order_with_means(q, k, v, q_order, k_order, (5, 12), parts=parts)
    for found, x, order in zip(tokens, (q, k, v), (q_order, k_order, k_order), strict=True):
        assert torch.equal(found, gather_tokens(x, order))
    for means, x, unit in ((q_means, tokens.q, 5), (k_means, tokens.k, 12)):
        exact = torch.stack([run.double().mean(dim=2) for run in x.split(unit, dim=2)], dim=2)
        torch.testing.assert_close(means.double(), exact, atol=1e-6, rtol=0)


def test_bad_arguments_are_refused() -> None:
    q, order = torch.zeros(1, 2, 9, 16), torch.arange(9)[None]
    with pytest.raises(ValueError, match=r"^k: torch.float32 \[1, 2, 8, 16\] on cpu; valid: torch.float32 \[1, 2, 9"):
        order_with_means(q, q[:, :, :8], q, order, order, (4, 4), parts=False)
    with pytest.raises(ValueError, match=r"^block: 0; valid: at least 1 token"):
        order_with_means(q, q, q, order, order, (4, 0), parts=False)
    with pytest.raises(ValueError, match=r"^order: torch.int64 \[3, 9\]; valid: torch.int64 \[1 or 2"):
        order_with_means(q, q, q, order, order.expand(3, -1), (4, 4), parts=False)
    with pytest.raises(ValueError, match=r"^order: for 8 tokens; valid: 9, as many as q has"):
        order_with_means(q, q, q, order[:, :8], order, (4, 4), parts=False)


@pytest.mark.gpu
class TestCuda:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("head_size", [64, 72, 88, 96, 128, 256])
    @pytest.mark.parametrize("shared", [True, False])
    def test_every_run_of_a_unit(self, qkv, head_size, shared, dtype) -> None:
        heads = 1 if shared else 3
        for seq, units in ((1, (16, 16)), (1000, (128, 64)), (777, (16, 16)), (515, (4, 32)), (300, (8, 128))):
            tensors = qkv(2, 3, seq, head_size, dtype, "cuda")
            check(tensors, orders(heads, seq), orders(heads, seq, 1), units, parts=max(units) < 64)

    def test_offsets_beyond_two_gigabytes(self) -> None:
        memory = torch.randn(130, 2**25 // 64, 64, device="cuda", dtype=torch.bfloat16)  # tokens 2^25 elements apart
        far = [memory[:, i : i + 1].transpose(0, 1)[None] for i in (0, 1, 2**25 // 64 - 1)]
        check(far, orders(1, 130), orders(1, 130, 1), (64, 64), False)


def test_units_are_those_that_blocks_and_parts_have() -> None:
    assert {16, 32, 64, 128} <= set(UNITS)
