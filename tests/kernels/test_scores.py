"""Scores of blocks from those of their parts, and a few rows under masks: each against float64, ragged sizes first."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_dit.kernels import rows, scores
from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.rows import rows_under_masks, torch_rows
from sparse_dit.kernels.rows_triton import triton_rows
from sparse_dit.kernels.scores import part_scores, torch_scores
from sparse_dit.kernels.scores_triton import Launch, triton_part_means, triton_scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A product of D terms in fp32, each rounded to 2^-24 of a sum of up to D times their size; inputs are exact.
EPSILON = 2**-23


def drawn(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def oracle_scores(q: Tensor, k: Tensor, per_q: int, per_k: int, scale: float, reduction: str) -> Tensor:
    """Pair by pair of blocks, in float64."""
    products = scale * q.double() @ k.double().mT
    found = []
    for some in products.split(per_q, dim=2):
        pairs = [part.flatten(2) for part in some.split(per_k, dim=3)]
        found.append(torch.stack([p.amax(-1) if reduction == "max" else p.logsumexp(-1) for p in pairs], dim=-1))
    return torch.stack(found, dim=2)


Scores = Callable[..., Tensor]


def triton(q: Tensor, k: Tensor, per_q: int, per_k: int, scale: float, reduction: str) -> Tensor:
    # Small tiles: several of them, and ragged ones, in inputs that the interpreter gets through.
    return triton_scores(q, k, per_q, per_k, scale, reduction, Launch(16, 16, num_warps=4, num_stages=2))


@pytest.mark.parametrize("compute", [torch_scores, triton], ids=["torch", "triton"])
@pytest.mark.parametrize("reduction", scores.REDUCTIONS)
@pytest.mark.parametrize(
    ("q_parts", "k_parts", "per_q", "per_k", "head_size"),
    [(37, 71, 2, 4, 72), (1, 1, 8, 4, 64), (40, 36, 8, 2, 64), (19, 50, 1, 3, 96)],
)
def test_scores_are_those_of_all_pairs_of_parts(
    compute: Scores, reduction: str, q_parts: int, k_parts: int, per_q: int, per_k: int, head_size: int
) -> None:
    q, k = drawn(2, 3, q_parts, head_size), drawn(2, 3, k_parts, head_size, seed=1)
    found = compute(q, k, per_q, per_k, head_size**-0.5, reduction)
    exact = oracle_scores(q, k, per_q, per_k, head_size**-0.5, reduction)
    assert found.dtype is torch.float32
    assert found.shape == (2, 3, math.ceil(q_parts / per_q), math.ceil(k_parts / per_k))
    # |product| stays below head_size * 4 * 4; the sums of exponentials of at most 32 terms add their own rounding.
    torch.testing.assert_close(found.double(), exact, atol=(16 * head_size**0.5 + 32) * EPSILON, rtol=0)


@pytest.mark.parametrize("ordered", [None, 1, 3])
@pytest.mark.parametrize(("tokens", "part", "head_size"), [(203, 16, 72), (64, 4, 64), (5, 8, 64), (130, 64, 96)])
def test_part_means_are_those_of_runs_of_the_order(tokens: int, part: int, head_size: int, ordered: int | None) -> None:
    x = drawn(2, tokens, 3, head_size).transpose(1, 2)
    order = None if ordered is None else torch.stack([torch.randperm(tokens) for _ in range(ordered)]).to(DEVICE)
    found = triton_part_means(x, part, order)
    in_order = x if order is None else gather_tokens(x, order)
    exact = torch.stack([run.double().mean(dim=2) for run in in_order.split(part, dim=2)], dim=2)
    assert found.dtype is x.dtype
    torch.testing.assert_close(found.double(), exact, atol=0, rtol=2**-10)  # one rounding to 16 bits of small sums


def test_the_torch_path_gives_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = drawn(1, 2, 37, 64, dtype=torch.float32), drawn(1, 2, 41, 64, dtype=torch.float32, seed=1)
    whole = torch_scores(q, k, 4, 2, 0.125, "logsumexp")
    monkeypatch.setattr(scores, "SCORES", 1)  # row of blocks by row
    torch.testing.assert_close(torch_scores(q, k, 4, 2, 0.125, "logsumexp"), whole)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"per_q": 0}, "per_q: 0; valid: at least 1 part"),
        ({"reduction": "mean"}, "reduction: 'mean'; valid: one of "),
        ({"k": torch.zeros(1, 2, 4, 32)}, r"k: torch.float32 \[1, 2, 4, 32\] on cpu; valid: "),
    ],
)
def test_bad_arguments_of_scores_are_refused(changes: dict[str, object], told: str) -> None:
    given = {"q": torch.zeros(1, 2, 4, 64), "k": torch.zeros(1, 2, 4, 64), "per_q": 2, "per_k": 2} | changes
    with pytest.raises(ValueError, match=f"^{told}"):
        part_scores(**{"scale": 1.0, "reduction": "max", **given})  # type: ignore[arg-type]


def seen(count: int, q_rows: int, keys: int) -> Tensor:
    """Masks under which every row sees something, and long spans without a key for some rows."""
    masks = torch.rand(count, q_rows, keys, generator=torch.Generator().manual_seed(3)) < 0.2
    masks[0, :, keys // 2 :] = False
    masks[..., 0] = True
    return masks.to(DEVICE)


@pytest.mark.parametrize("compute", [torch_rows, triton_rows], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("batch", "heads", "q_rows", "keys", "head_size"), [(2, 3, 17, 203, 72), (1, 2, 64, 64, 64), (1, 1, 70, 129, 64)]
)
def test_rows_under_masks_are_those_of_whole_softmax(
    compute: Scores, batch: int, heads: int, q_rows: int, keys: int, head_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "SCORES", 1)  # head by head
    q = drawn(batch, heads, q_rows, head_size)
    # As models lay out memory: heads of a token side by side.
    k, v = (drawn(batch, keys, heads, head_size, seed=seed).transpose(1, 2) for seed in (1, 2))
    masks = seen(2, q_rows, keys)
    found = compute(q, k, v, masks, head_size**-0.5)
    weights = head_size**-0.5 * q.double() @ k.double().mT
    exact = [weights.softmax(-1) @ v.double()]
    exact += [weights.masked_fill(~mask, -torch.inf).softmax(-1) @ v.double() for mask in masks]
    assert found.shape == (3, batch, heads, q_rows, head_size)
    # Weights are rounded to 16 bits before they meet v: 2^-11 of each, whose sum is 1, times |v| < 5.
    torch.testing.assert_close(found.double(), torch.stack(exact), atol=5 * 2**-11, rtol=0)


def test_bad_masks_are_refused() -> None:
    q, k = torch.zeros(1, 2, 4, 64), torch.zeros(1, 2, 9, 64)
    with pytest.raises(ValueError, match=r"^masks: torch.bool \[1, 4, 8\]; valid: bool \[masks, 4, 9\]"):
        rows_under_masks(q, k, k, torch.ones(1, 4, 8, dtype=torch.bool), scale=1.0)
    with pytest.raises(ValueError, match=r"^v: torch.float32 \[1, 2, 8, 64\] on cpu; valid: "):
        rows_under_masks(q, k, torch.zeros(1, 2, 8, 64), torch.ones(1, 4, 9, dtype=torch.bool), scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_at_pinned_launches_on_a_gpu(head_size: int) -> None:
    q = drawn(1, 2, 1001, head_size, dtype=torch.bfloat16)
    k, v = (drawn(1, 2, 2003, head_size, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    for reduction in scores.REDUCTIONS:
        found = part_scores(q, k, 8, 4, scale=head_size**-0.5, reduction=reduction)
        exact = oracle_scores(q, k, 8, 4, head_size**-0.5, reduction)
        torch.testing.assert_close(found.double(), exact, atol=(16 * head_size**0.5 + 32) * EPSILON, rtol=0)
    masks = seen(2, 64, 2003)
    found = rows_under_masks(q[:, :, :64], k, v, masks, scale=head_size**-0.5)
    exact = torch_rows(q[:, :, :64].double(), k.double(), v.double(), masks, head_size**-0.5)
    torch.testing.assert_close(found, exact, atol=5 * 2**-8, rtol=0)
