"""Scores of blocks from those of their parts, against float64, ragged sizes first."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_dit.kernels import scores
from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.lists import lists_to_mask, top_k_lists
from sparse_dit.kernels.scores import block_scores, mark_unlike, part_scores, torch_scores
from sparse_dit.kernels.scores_triton import (
    TILES,
    Launch,
    Tiles,
    triton_block_scores,
    triton_mark_unlike,
    triton_part_means,
    triton_scores,
)

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


def triton_blocks(q: Tensor, k: Tensor, scale: float) -> Tensor:
    # Small tiles on a machine without a GPU, as above.
    return triton_block_scores(q, k, scale, TILES if q.is_cuda else Tiles(16, 32, 32, num_warps=4, num_stages=1))


def oracle_block_scores(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """In float64, and how far off each may be.

    Each of D products is off by up to 3 2^-20 of it, where they are three of numbers cut into two parts of 11 bits, and
    rounded or cut off where it is added.
    """
    exact, size = (scale * a.double() @ b.double().mT for a, b in ((q, k), (q.abs(), k.abs())))
    return exact, size * (3 * 2**-20 + 2 * q.shape[-1] * 2**-24)


@pytest.mark.parametrize("compute", [block_scores, triton_blocks], ids=["by device", "triton"])
@pytest.mark.parametrize(("rows", "columns", "head_size"), [(37, 71, 72), (1, 1, 64), (65, 3, 256), (19, 50, 16)])
def test_block_scores_are_products_of_means(compute: Scores, rows: int, columns: int, head_size: int) -> None:
    q = drawn(2, 3, rows, head_size, dtype=torch.float32)
    k = drawn(2, 3, head_size, columns, dtype=torch.float32, seed=1).mT
    found = compute(q, k, 0.3)
    exact, off = oracle_block_scores(q, k, 0.3)
    assert (found.dtype, found.shape) == (torch.float32, (2, 3, rows, columns))
    assert ((found.double() - exact).abs() <= off).all()


@pytest.mark.parametrize("compute", [block_scores, triton_blocks], ids=["by device", "triton"])
def test_blocks_with_equal_means_score_alike_and_the_first_is_taken(compute: Scores) -> None:
    """Whole numbers: nothing is rounded anywhere, and an oracle has the same ties."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-3, 4, (1, 2, n, 64), generator=generator).float().to(DEVICE) for n in (40, 75))
    k[:, :, 40:] = k[:, :, torch.arange(35) % 7]  # each of seven stands six times
    found = compute(q, k, 0.125)
    exact, _ = oracle_block_scores(q, k, 0.125)
    assert torch.equal(found.double(), exact)
    order = exact.sort(dim=-1, descending=True, stable=True).indices
    for keep in (1, 20, 45):
        expected = torch.zeros_like(exact, dtype=torch.bool).scatter_(-1, order[..., :keep], True)
        assert torch.equal(lists_to_mask(top_k_lists(found, keep, block_q=16, block_k=16), 75), expected)


@pytest.mark.parametrize("backend", ["by device", "triton"])
@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 300), (40, 256)])
def test_unlike_blocks_are_marked(rows: int, columns: int, lowest: bool, backend: str) -> None:
    scores = drawn(2, 3, rows, columns, dtype=torch.float32)
    q_alike, k_alike = (drawn(2, 3, n, dtype=torch.float32, seed=n).abs() for n in (rows, columns))
    q_alike[0, 0, 0] = k_alike[1, 2, 0] = 0.25  # to no more than that: not enough
    mark = mark_unlike if backend == "by device" else triton_mark_unlike
    expected = scores.clone()
    found = mark(scores, q_alike, k_alike, 0.25, lowest=lowest)
    unlike_q, unlike_k = ~(q_alike > 0.25)[..., None], ~(k_alike > 0.25)[..., None, :]
    assert torch.equal(found, unlike_q | unlike_k)
    assert found[0, 0, 0].all()
    assert found[1, 2, :, 0].all()
    if lowest:
        expected = torch.where(unlike_k, torch.finfo(torch.float32).min, expected)
    assert torch.equal(scores, expected)


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


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"q": torch.zeros(1, 2, 5, 8, dtype=torch.float16)}, "q: torch.float16; valid: torch.float32"),
        ({"q": torch.zeros(2, 5, 8)}, r"q: torch.float32 \[2, 5, 8\]"),
        ({"k": torch.zeros(1, 2, 3, 16)}, r"k: torch.float32 \[1, 2, 3, 16\] on cpu; valid"),
        ({"scale": 0.0}, "scale: 0.0; valid: a positive finite number"),
    ],
)
def test_bad_arguments_of_block_scores_are_refused(changes: dict[str, object], told: str) -> None:
    given = {"q": torch.zeros(1, 2, 5, 8), "k": torch.zeros(1, 2, 3, 8), "scale": 1.0} | changes
    with pytest.raises(ValueError, match=f"^{told}"):
        block_scores(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scores": torch.zeros(1, 2, 4, 3).mT}, r"scores: torch.float32 \[1, 2, 3, 4\]; valid: a contiguous fp32"),
        ({"scores": torch.zeros(1, 2, 3, 4, dtype=torch.float16)}, "scores: torch.float16"),
        ({"q_alike": torch.zeros(1, 2, 4)}, r"q_alike: \[1, 2, 4\] on cpu; valid: \[1, 2, 3\] on cpu"),
        ({"k_alike": torch.zeros(1, 1, 4)}, r"k_alike: \[1, 1, 4\] on cpu; valid: \[1, 2, 4\] on cpu"),
    ],
)
def test_bad_arguments_of_marks_are_refused_and_no_score_is_written(changes: dict[str, object], told: str) -> None:
    own = {"scores": torch.zeros(1, 2, 3, 4), "q_alike": torch.zeros(1, 2, 3), "k_alike": torch.zeros(1, 2, 4)}
    given = own | changes
    with pytest.raises(ValueError, match=f"^{told}"):
        mark_unlike(**given, least=0.5, lowest=True)  # type: ignore[arg-type]
    assert not given["scores"].any()  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_at_pinned_launches_on_a_gpu(head_size: int) -> None:
    q = drawn(1, 2, 1001, head_size, dtype=torch.bfloat16)
    k = drawn(1, 2, 2003, head_size, dtype=torch.bfloat16, seed=1)
    for reduction in scores.REDUCTIONS:
        found = part_scores(q, k, 8, 4, scale=head_size**-0.5, reduction=reduction)
        exact = oracle_scores(q, k, 8, 4, head_size**-0.5, reduction)
        torch.testing.assert_close(found.double(), exact, atol=(16 * head_size**0.5 + 32) * EPSILON, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns", "head_size"), [(929, 1857, 128), (257, 1001, 64), (300, 513, 256)])
def test_block_scores_on_a_gpu_choose_as_float64_does(rows: int, columns: int, head_size: int) -> None:
    """Means like those of tokens with a common offset, and planted ties wherever they stand."""
    q = drawn(1, 3, rows, head_size, dtype=torch.float32) + 2
    k = drawn(1, 3, columns, head_size, dtype=torch.float32, seed=1) - 1
    copies = columns // 3
    k[:, :, -copies:] = k[:, :, 5 : 5 + copies]
    scale = head_size**-0.5
    found = block_scores(q, k, scale)
    exact, off = oracle_block_scores(q, k, scale)
    assert ((found.double() - exact).abs() <= off).all()
    assert torch.equal(found[..., -copies:], found[..., 5 : 5 + copies])
    keep = columns // 4
    mask = lists_to_mask(top_k_lists(found, keep, block_q=16, block_k=16), columns)
    assert (mask.sum(dim=-1) == keep).all()
    worst = exact.masked_fill(~mask, torch.inf).amin(dim=-1)
    assert (exact.masked_fill(mask, -torch.inf).amax(dim=-1) - worst <= 2 * off.amax(dim=-1)).all()
    # Of two alike the first is taken before the second.
    assert not (mask[..., -copies:] & ~mask[..., 5 : 5 + copies]).any()
