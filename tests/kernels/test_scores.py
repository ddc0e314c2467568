"""Scores of blocks from those of their parts, against float64, ragged sizes first."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_dit.kernels import scores
from sparse_dit.kernels.gather import gather_tokens
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
    return triton_scores(q, k, per_q, per_k, scale, reduction, Launch(16, 16 * per_k, num_warps=4, num_stages=2))


@pytest.mark.parametrize("compute", [torch_scores, triton], ids=["torch", "triton"])
@pytest.mark.parametrize("reduction", scores.REDUCTIONS)
@pytest.mark.parametrize(
    ("q_parts", "k_parts", "per_q", "per_k", "head_size"),
    [(37, 71, 2, 4, 72), (1, 1, 8, 4, 64), (40, 36, 8, 2, 64), (19, 50, 1, 8, 96)],
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
    order = None if ordered is None else drawn(ordered, tokens, dtype=torch.float32).argsort(dim=1)
    found = triton_part_means(x, part, order)
    in_order = x if order is None else gather_tokens(x, order)
    exact = torch.stack([run.double().mean(dim=2) for run in in_order.split(part, dim=2)], dim=2)
    assert found.dtype is x.dtype
    # One rounding to 16 bits, of sums in fp32 of at most 64 numbers below 5.
    torch.testing.assert_close(found.double(), exact, atol=64 * 5 * 2**-24, rtol=2**-10)


def test_the_torch_path_gives_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = drawn(1, 2, 37, 64, dtype=torch.float32), drawn(1, 2, 41, 64, dtype=torch.float32, seed=1)
    whole = torch_scores(q, k, 4, 3, 0.125, "logsumexp")
    torch.testing.assert_close(whole.double(), oracle_scores(q, k, 4, 3, 0.125, "logsumexp"), atol=1e-5, rtol=0)
    monkeypatch.setattr(scores, "SCORES", 1)  # row of blocks by row
    torch.testing.assert_close(torch_scores(q, k, 4, 3, 0.125, "logsumexp"), whole)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"per_q": 0}, "per_q: 0; valid: at least 1 part"),
        ({"scale": 0.0}, "scale: 0.0; valid: a positive finite number"),
        ({"reduction": "mean"}, "reduction: 'mean'; valid: one of "),
        ({"k": torch.zeros(1, 2, 4, 32)}, r"k: torch.float32 \[1, 2, 4, 32\] on cpu; valid: "),
    ],
)
def test_bad_arguments_of_scores_are_refused(changes: dict[str, object], told: str) -> None:
    given = {"q": torch.zeros(1, 2, 4, 64), "k": torch.zeros(1, 2, 4, 64), "per_q": 2, "per_k": 2} | changes
    with pytest.raises(ValueError, match=f"^{told}"):
        part_scores(**{"scale": 1.0, "reduction": "max"} | given)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_at_pinned_launches_on_a_gpu(head_size: int) -> None:
    q = drawn(1, 2, 1001, head_size, dtype=torch.bfloat16)
    k = drawn(1, 2, 2003, head_size, dtype=torch.bfloat16, seed=1)
    for reduction in scores.REDUCTIONS:
        found = part_scores(q, k, 8, 4, scale=head_size**-0.5, reduction=reduction)
        exact = oracle_scores(q, k, 8, 4, head_size**-0.5, reduction)
        torch.testing.assert_close(found.double(), exact, atol=(16 * head_size**0.5 + 32) * EPSILON, rtol=0)
