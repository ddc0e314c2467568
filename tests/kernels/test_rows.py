"""Errors of a few rows under bands of keys: against whole softmax in float64, ragged sizes first."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_dit.kernels import rows, rows_triton
from sparse_dit.kernels.rows import band_errors, closest_orders, seen_keys
from sparse_dit.kernels.rows_triton import triton_band_errors, triton_closest_orders

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def units(seq: int, apart: int) -> tuple[Tensor, Tensor]:
    """Of runs of tokens, and of every n-th token; the first keys are seen by all, and the last query sees all."""
    token = torch.arange(seq, dtype=torch.int32)
    own = torch.stack([token // apart, token % -(-seq // apart)]).float()
    keys = own.clone()
    keys[:, :2], own[:, -1] = torch.nan, torch.nan
    return own.to(DEVICE), keys.to(DEVICE)


def exact_errors(q: Tensor, k: Tensor, v: Tensor, picked: Tensor, masks: Tensor, scale: float) -> Tensor:
    weights = scale * q[:, :, picked].double() @ k.double().mT
    whole = weights.softmax(-1) @ v.double()
    outs = [weights.masked_fill(~mask, -torch.inf).softmax(-1) @ v.double() for mask in masks]
    return torch.stack([(out - whole).square().sum(dim=-1) for out in outs])


def triton(q: Tensor, k: Tensor, v: Tensor, *rest: object, scale: float) -> Tensor:
    return triton_band_errors(q, k, v, *rest, scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("compute", [band_errors, triton], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("batch", "heads", "count", "seq", "head_size", "tile"),
    [(2, 3, 17, 203, 72, 32), (1, 2, 64, 64, 64, 64), (1, 1, 70, 129, 64, 64), (1, 1, 5, 9, 64, 32)],
)
def test_errors_are_those_of_whole_softmax(
    compute: Callable[..., Tensor],
    batch: int,
    heads: int,
    count: int,
    seq: int,
    head_size: int,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows, "SCORES", 1)  # head by head
    monkeypatch.setattr(rows_triton, "tile_for", lambda *_: (tile, 2))
    # As models lay out memory: heads of a token side by side.
    q, k, v = (drawn(batch, seq, heads, head_size, seed=seed).transpose(1, 2) for seed in range(3))
    picked = torch.randint(seq, (count,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    own, keys = units(seq, 16)
    found = compute(q, k, v, picked, own, keys, 2, scale=head_size**-0.5)
    exact = exact_errors(q, k, v, picked, seen_keys(own[:, picked], keys, 2), head_size**-0.5)
    assert found.shape == (2, batch, heads, count)
    # Weights are rounded to 16 bits before they meet v, 2^-11 of outputs whose distances are squared.
    torch.testing.assert_close(found.double().sum(-1), exact.sum(-1), atol=0, rtol=4 * 2**-11)
    torch.testing.assert_close(found.double(), exact, atol=0, rtol=2**-6)


@pytest.mark.parametrize("compute", [band_errors, triton], ids=["torch", "triton"])
def test_a_row_without_a_key_in_a_band_gets_zeros_there(compute: Callable[..., Tensor]) -> None:
    q, k, v = (drawn(1, 1, 40, 64, seed=seed) for seed in range(3))
    token = torch.arange(40, dtype=torch.float32, device=DEVICE)
    own, keys = torch.stack([token, token]), torch.stack([token, token + 1000])
    picked = torch.tensor([3, 20], device=DEVICE)
    found = compute(q, k, v, picked, own, keys, 100, scale=0.125)
    whole = (0.125 * q[:, :, picked].double() @ k.double().mT).softmax(-1) @ v.double()
    assert float(found[0].sum()) == pytest.approx(0.0, abs=1e-6)
    assert found[1].flatten().tolist() == pytest.approx(whole.square().sum(-1).flatten().tolist(), rel=2**-9)


def test_ids_of_rows_may_lie_apart() -> None:
    q, k, v = (drawn(1, 1, 40, 64, seed=seed) for seed in range(3))
    picked = torch.tensor([[3, 39], [20, 39], [7, 39]], device=DEVICE)
    found = [triton(q, k, v, ids, *units(40, 8), 2, scale=0.125) for ids in (picked[:, 0], picked[:, 0].clone())]
    assert torch.equal(*found)


@pytest.mark.parametrize("compute", [closest_orders, triton_closest_orders], ids=["torch", "triton"])
@pytest.mark.parametrize(("batch", "count", "seq"), [(1, 1, 5), (2, 64, 1023), (3, 70, 2050)])
def test_a_head_gets_the_order_of_the_smaller_sum(
    compute: Callable[..., Tensor], batch: int, count: int, seq: int
) -> None:
    errors = drawn(2, batch, 5, count, dtype=torch.float32).square()
    errors[:, 0, 1:3, -1] = torch.tensor([[9.0, 0.0], [0.0, 9.0]], device=DEVICE) * count  # the last row decides
    errors[0, :, 0] = errors[1, :, 0]  # alike: the first
    orders = torch.stack([torch.arange(seq), torch.randperm(seq)]).to(DEVICE)
    found = compute(errors, orders)
    second = (errors[1].double().sum(dim=(0, 2)) < errors[0].double().sum(dim=(0, 2))).tolist()
    assert second[:3] == [False, True, False]
    assert torch.equal(found, torch.stack([orders[int(is_second)] for is_second in second]))


def test_bad_arguments_are_refused() -> None:
    q, k = torch.zeros(1, 2, 9, 64), torch.zeros(1, 2, 8, 64)
    picked, token = torch.arange(4), torch.zeros(2, 9)
    with pytest.raises(ValueError, match=r"^k: torch.float32 \[1, 2, 8, 64\] on cpu; valid: torch.float32 \[1, 2, 9"):
        band_errors(q, k, q, picked, token, token, 1, scale=1.0)
    with pytest.raises(ValueError, match=r"^rows: torch.int32 \[4\] on cpu; valid: torch.int64 \[rows\]"):
        band_errors(q, q, q, picked.int(), token, token, 1, scale=1.0)
    with pytest.raises(ValueError, match=r"^keys: torch.float32 \[2, 8\] on cpu; valid: torch.float32 \[bands, 9\]"):
        band_errors(q, q, q, picked, token, token[:, 1:], 1, scale=1.0)
    with pytest.raises(ValueError, match=r"^reach: -1; valid: 0 or more units"):
        band_errors(q, q, q, picked, token, token, -1, scale=1.0)
    with pytest.raises(
        ValueError, match=r"^errors: torch.float32 \[3, 1, 2, 4\]; valid: torch.float32 \[2, B, H, rows"
    ):
        closest_orders(torch.zeros(3, 1, 2, 4), torch.zeros(2, 9, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"^orders: torch.float32 \[2, 9\] on cpu; valid: torch.int64 \[2, tokens\] on"
    ):
        closest_orders(torch.zeros(2, 1, 2, 4), token)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 72, 88, 96, 128])
def test_at_pinned_launches_on_a_gpu(head_size: int) -> None:
    q, k, v = (drawn(1, 3, 5003, head_size, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    picked = torch.randint(5003, (64,), generator=torch.Generator().manual_seed(4)).cuda()
    own, keys = units(5003, 128)
    found = band_errors(q, k, v, picked, own, keys, 3, scale=head_size**-0.5)
    exact = exact_errors(q, k, v, picked, seen_keys(own[:, picked], keys, 3), head_size**-0.5)
    torch.testing.assert_close(found.double().sum(-1), exact.sum(-1), atol=0, rtol=4 * 2**-8)
