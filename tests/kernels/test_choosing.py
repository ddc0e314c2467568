"""From scores of blocks to block lists: top-k, top-p and a threshold, on the host and in Triton, against loops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.lists import (
    lists_to_mask,
    mask_to_lists,
    pack_bits,
    spread_lists,
    threshold_lists,
    top_k_lists,
    top_p_lists,
    unpack_bits,
)
from sparse_dit.kernels.oracle_blocks import oracle_threshold, oracle_top_k, oracle_top_k_per_head, oracle_top_p

BACKENDS = ["torch", "triton"]
SIZES = {"block_q": 16, "block_k": 16}


def columns(lists: BlockList) -> list[list[list[list[int]]]]:
    """The listed blocks of each row, after the constructor's own check of every entry."""
    BlockList(lists.indices, lists.counts, 16, 16)
    return [
        [[row[:count] for row, count in zip(*head, strict=True)] for head in zip(*entry, strict=True)]
        for entry in zip(lists.indices.tolist(), lists.counts.tolist(), strict=True)
    ]


def each_row(tensor: Tensor, choose: Callable[..., list[int]]) -> list[list[list[list[int]]]]:
    """choose(b, h, row, values) for each row."""
    return [
        [[choose(b, h, i, row) for i, row in enumerate(head)] for h, head in enumerate(entry)]
        for b, entry in enumerate(tensor.tolist())
    ]


def through_triton(rule: str, scores: Tensor, capacity: int, *arguments: Any, **named: Any) -> BlockList:
    from sparse_dit.kernels.lists_triton import triton_lists

    return BlockList(*triton_lists(rule, scores, capacity, *arguments, **named), **SIZES)


def few_values(shape: tuple[int, ...], seed: int, values: int = 5) -> Tensor:
    """Scores with many ties: 0 and -0 among them, and -inf."""
    scores = torch.randint(-values, values, shape, generator=torch.Generator().manual_seed(seed)).float()
    scores[scores == -values] = -torch.inf
    return torch.where((scores == 0) & (torch.arange(shape[-1]) % 2 == 0), -0.0, scores)


def some_forced(kind: str, shape: tuple[int, ...], seed: int) -> Tensor | None:
    """No forced blocks, single ones of each row, or whole columns shared by batch, heads and rows."""
    if kind == "none":
        return None
    size = shape if kind == "single" else (1, 1, 1, shape[-1])
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.15


def forced_rows(forced: Tensor | None, shape: tuple[int, ...]) -> list[list[list[list[bool]]]]:
    return (torch.zeros(shape, dtype=torch.bool) if forced is None else forced.expand(shape)).tolist()


def drawn_rows(*most: int) -> Callable[..., Any]:
    """Scores of up to so many batch entries, heads and query blocks, and of up to 40 key blocks."""
    return given(
        shape=st.tuples(*(st.integers(1, top) for top in (*most, 40))),
        seed=st.integers(0, 2**20),
        kind=st.sampled_from(["none", "single", "columns"]),
        data=st.data(),
    )


on_the_host = drawn_rows(2, 3, 4)
in_triton = drawn_rows(1, 2, 2)  # Triton's interpreter takes a tenth of a second a row


def check_top_k_of_a_row(shape, seed, kind, data, backend):
    scores, forced = few_values(shape, seed), some_forced(kind, shape, seed)
    heads, k_blocks = shape[1], shape[3]
    keep = data.draw(st.sampled_from(["int", "head", "row"]))
    generator = torch.Generator().manual_seed(seed)
    budgets = {
        "int": torch.randint(1, k_blocks + 3, (1, 1, 1), generator=generator).expand(shape[:3]),
        "head": torch.randint(-1, k_blocks + 3, (heads,), generator=generator)[:, None].expand(shape[:3]),
        "row": torch.randint(-1, k_blocks + 3, shape[:3], generator=generator),
    }[keep]
    given_keep = {"int": int(budgets[0, 0, 0]), "head": budgets[0, :, 0], "row": budgets}[keep]
    if backend == "torch":
        lists = top_k_lists(scores, given_keep, forced=forced, **SIZES)
        assert lists.indices.shape[-1] == (min(given_keep, k_blocks) if (keep, kind) == ("int", "none") else k_blocks)
    else:
        budget = min(given_keep, k_blocks) if keep == "int" else budgets.clamp(1, k_blocks)
        lists = through_triton("top_k", scores, k_blocks, budget, forced)
    must = forced_rows(forced, shape)
    wanted = budgets.clamp(1, k_blocks).tolist()
    assert columns(lists) == each_row(scores, lambda b, h, i, row: oracle_top_k(row, wanted[b][h][i], must[b][h][i]))
    free = k_blocks - torch.tensor(must).sum(dim=-1)
    assert torch.equal(lists.counts, (torch.minimum(budgets.clamp(1, k_blocks), free) + k_blocks - free).int())


@settings(max_examples=25, deadline=None)
@on_the_host
def test_top_k_of_a_row_on_the_host(shape, seed, kind, data):
    check_top_k_of_a_row(shape, seed, kind, data, "torch")


@settings(max_examples=8, deadline=None)
@in_triton
def test_top_k_of_a_row_in_triton(shape, seed, kind, data):
    check_top_k_of_a_row(shape, seed, kind, data, "triton")


@settings(max_examples=25, deadline=None)
@on_the_host
def test_top_k_of_a_head(shape, seed, kind, data):
    scores, forced = few_values(shape, seed), some_forced(kind, shape, seed)
    keep = data.draw(st.integers(1, shape[-1] + 2))
    per_head = data.draw(st.booleans())
    budget = torch.full((shape[1],), keep) if per_head else keep
    lists = top_k_lists(scores, budget, forced=forced, per="head", **SIZES)
    must = forced_rows(forced, shape)
    assert columns(lists) == [
        [oracle_top_k_per_head(head, min(keep, shape[-1]), must[b][h]) for h, head in enumerate(entry)]
        for b, entry in enumerate(scores.tolist())
    ]


def check_top_p(shape, seed, kind, data, backend):
    """Probabilities and p are multiples of 2^-10, so that no sum is rounded and p is often met exactly."""
    forced = some_forced(kind, shape, seed)
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, 1025, (*shape[:3], shape[3] - 1), generator=generator).sort(dim=-1).values
    edges = torch.cat((torch.zeros(*shape[:3], 1), cuts, torch.full((*shape[:3], 1), 1024)), dim=-1)
    probabilities = edges.diff(dim=-1) / 1024
    numerators = torch.tensor(data.draw(st.lists(st.integers(0, 1024), min_size=shape[1], max_size=shape[1])))
    crossing, at_least = data.draw(st.booleans()), data.draw(st.integers(1, shape[-1]))
    p = numerators / 1024
    if backend == "torch":
        lists = top_p_lists(probabilities, p, crossing=crossing, at_least=at_least, forced=forced, **SIZES)
    else:
        rule = "top_p_crossing" if crossing else "top_p"
        lists = through_triton(rule, probabilities, shape[-1], p[:, None], forced, at_least)
    must = forced_rows(forced, shape)
    assert columns(lists) == each_row(
        probabilities, lambda b, h, i, row: oracle_top_p(row, p[h].item(), crossing, at_least, must[b][h][i])
    )


@settings(max_examples=25, deadline=None)
@on_the_host
def test_top_p_on_the_host(shape, seed, kind, data):
    check_top_p(shape, seed, kind, data, "torch")


@settings(max_examples=8, deadline=None)
@in_triton
def test_top_p_in_triton(shape, seed, kind, data):
    check_top_p(shape, seed, kind, data, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("crossing", [False, True])
@pytest.mark.parametrize("k_blocks", [1, 7, 130])
def test_top_p_of_a_softmax(k_blocks, crossing, backend):
    """Whole scores with many ties, far from 0; no sum of the exact softmax is near p."""
    shape, p = (2, 3, 4, k_blocks), 0.61803
    scores = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(k_blocks)).float() - 200
    scores[0, 0, 0] = -1e30  # all alike
    exact = scores.double().softmax(dim=-1)
    sums = exact.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    assert ((sums - p).abs() > 1e-5).all()
    forced = some_forced("single", shape, 0)
    if backend == "torch":
        lists = top_p_lists(scores, p, crossing=crossing, forced=forced, softmax=True, **SIZES)
    else:
        rule = "top_p_crossing" if crossing else "top_p"
        lists = through_triton(rule, scores, k_blocks, p, forced, softmax=True)
    must = forced_rows(forced, shape)
    assert columns(lists) == each_row(exact, lambda b, h, i, row: oracle_top_p(row, p, crossing, 1, must[b][h][i]))


def check_threshold(shape, seed, kind, data, backend):
    """tau is irrational to the scores, but for 0 with a mean that no sum rounds."""
    scores = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(seed)).float()
    forced = some_forced(kind, shape, seed)
    tau = data.draw(st.sampled_from([-1.2345678, 0.0123456, 1.3456789, 99.0]))
    if backend == "torch":
        lists = threshold_lists(scores, tau, forced=forced, **SIZES)
    else:
        lists = through_triton("threshold", scores, shape[-1], tau, forced)
    must = forced_rows(forced, shape)
    assert columns(lists) == each_row(scores, lambda b, h, i, row: oracle_threshold(row, tau, must[b][h][i]))


@settings(max_examples=25, deadline=None)
@on_the_host
def test_threshold_on_the_host(shape, seed, kind, data):
    check_threshold(shape, seed, kind, data, "torch")


@settings(max_examples=8, deadline=None)
@in_triton
def test_threshold_in_triton(shape, seed, kind, data):
    check_threshold(shape, seed, kind, data, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_rules_at_the_crossing_by_hand(backend):
    probabilities = torch.tensor([0.125, 0.5, 0.125, 0.25])[None, None, None]
    for p, crossing, expected in (
        (0.75, True, [1, 3]),  # met exactly
        (0.75, False, [1, 3]),
        (0.76, True, [0, 1, 3]),
        (0.76, False, [1, 3]),
        (0.4, True, [1]),
        (0.4, False, [1]),  # none fits: the best one
        (1.0, True, [0, 1, 2, 3]),
        (0.0, True, [1]),
    ):
        if backend == "torch":
            lists = top_p_lists(probabilities, p, crossing=crossing, **SIZES)
        else:
            lists = through_triton("top_p_crossing" if crossing else "top_p", probabilities, 4, p)
        assert columns(lists) == [[[expected]]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_planted_blocks_are_found_in_views(dtype, backend):
    scores = torch.full((3, 2, 5, 300), -60_000.0, dtype=dtype)
    planted = [7, 128, 255, 299]
    scores[..., planted] = torch.tensor([-1.0, 1e-7, 0.5, 60_000.0], dtype=dtype)
    view = scores.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)[2:, :, 3:]  # strided even along the row
    lists = top_k_lists(view, 4, **SIZES) if backend == "torch" else through_triton("top_k", view, 4, 4)
    assert columns(lists) == each_row(view, lambda *_: planted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_finite_score(backend):
    scores = torch.full((1, 1, 2, 9), -torch.inf)
    lists = top_k_lists(scores, 3, **SIZES) if backend == "torch" else through_triton("top_k", scores, 3, 3)
    assert columns(lists) == [[[[0, 1, 2]] * 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_are_spread_over_their_key_blocks(backend):
    generator = torch.Generator().manual_seed(0)
    taken = torch.rand(2, 3, 4, 5, generator=generator) < 0.4
    part = torch.tensor([0, 0, 1, 1, 1, 3, 4, 4, 2, 2, 2])
    forced = torch.rand(1, 1, 4, 11, generator=generator) < 0.2
    forced[..., 0] = True
    if backend == "torch":
        lists = spread_lists(taken, part, forced=forced, **SIZES)
    else:
        from sparse_dit.kernels.lists_triton import triton_lists

        lists = BlockList(*triton_lists("mask", taken, 11, forced=forced, columns=part), **SIZES)
    assert torch.equal(lists_to_mask(lists, 11), taken[..., part] | forced)


def test_a_mask_through_triton(random_mask):
    mask = random_mask(2, 2, 3, 37)
    assert columns(through_triton("mask", mask, 37)) == columns(mask_to_lists(mask, **SIZES))


SCORES = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (
            top_k_lists,
            {"scores": SCORES.double()},
            r"scores: torch.float64 .*; valid: a non-empty \[B, H, QB, KB\] of .*",
        ),
        (top_k_lists, {"scores": SCORES[..., :0]}, r"scores: .*; valid: a non-empty \[B, H, QB, KB\] of .*"),
        (top_k_lists, {"keep": 0}, "keep: 0; valid: at least 1 block"),
        (top_k_lists, {"keep": torch.ones(3)}, r"keep: torch.float32 .*; valid: integers \[3\] or \[2, 3, 4\] on cpu"),
        (top_k_lists, {"keep": SCORES[..., 0].long(), "per": "head"}, r"keep: .*; valid: integers \[3\] on cpu"),
        (top_k_lists, {"per": "batch"}, r"per: 'batch'; valid: one of \('row', 'head'\)"),
        (top_k_lists, {"forced": SCORES}, r"forced: .*; valid: bool \[2 or 1, 3 or 1, 4 or 1, 5\]"),
        (top_k_lists, {"forced": SCORES[..., :1].bool()}, r"forced: .*; valid: bool \[2 or 1, 3 or 1, 4 or 1, 5\]"),
        (top_k_lists, {"forced": SCORES.bool().to("meta")}, "forced: on meta; valid: cpu, where scores is"),
        (top_p_lists, {"probabilities": SCORES[0]}, r"probabilities: .*; valid: a non-empty \[B, H, QB, KB\] of .*"),
        (top_p_lists, {"p": 1.5}, "p: 1.5; valid: 0 to 1"),
        (top_p_lists, {"p": torch.ones(2)}, r"p: .*; valid: a number, or floating point \[3\] on cpu"),
        (top_p_lists, {"at_least": 6}, "at_least: 6; valid: 1 to 5 blocks"),
        (threshold_lists, {"tau": float("nan")}, "tau: nan; valid: a finite number"),
        (threshold_lists, {"tau": torch.ones(3).int()}, r"tau: .*; valid: a number, or floating point \[3\] on cpu"),
    ],
)
def test_bad_arguments(function, change, message):
    arguments: dict[str, Any] = {
        top_k_lists: {"scores": SCORES, "keep": 2},
        top_p_lists: {"probabilities": SCORES, "p": 0.5, "crossing": True},
        threshold_lists: {"scores": SCORES, "tau": 1.0},
    }[function]
    with pytest.raises(ValueError, match=f"^{message}$"):
        function(**arguments | SIZES | change)


def cuda_calls(scores: Tensor, forced: Tensor | None) -> list[Callable[[], BlockList]]:
    """Each way from scores to lists, on the device of scores."""
    device, heads = scores.device, scores.shape[1]
    probabilities = scores.softmax(dim=-1)
    at_least = min(3, scores.shape[-1])
    keep, p = torch.arange(1, heads + 1, device=device), torch.linspace(0.1, 0.9, heads, device=device)
    return [
        lambda: top_k_lists(scores, 7, forced=forced, **SIZES),
        lambda: top_k_lists(scores, keep, forced=forced, **SIZES),
        lambda: top_k_lists(scores, 7, forced=forced, per="head", **SIZES),
        lambda: top_p_lists(probabilities, p, crossing=True, forced=forced, **SIZES),
        lambda: top_p_lists(probabilities, 0.5, crossing=False, forced=forced, at_least=at_least, **SIZES),
        lambda: top_p_lists(scores, p, crossing=True, forced=forced, softmax=True, **SIZES),
        lambda: threshold_lists(scores, 0.9876543, forced=forced, **SIZES),
        lambda: mask_to_lists(
            unpack_bits(pack_bits(scores >= 0), scores.shape[-1]), capacity=scores.shape[-1], **SIZES
        ),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("k_blocks", [1, 37, 512, 1857, 5000])
@pytest.mark.parametrize("kind", ["none", "single", "columns"])
def test_the_gpu_selects_what_the_host_does(k_blocks, kind):
    """Whole scores in a narrow range: many ties, and only sums of probabilities hang on rounding."""
    shape = (2, 3, 50, k_blocks)
    scores = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(k_blocks)).float()
    scores[..., 0] = 4  # every row has a score of at least 0
    forced = some_forced(kind, shape, k_blocks)
    on_gpu = cuda_calls(scores.cuda(), None if forced is None else forced.cuda())
    for number, (there, here) in enumerate(zip(on_gpu, cuda_calls(scores, forced), strict=True)):
        found, expected = there().to("cpu"), here()
        BlockList(found.indices, found.counts, 16, 16)
        if number in (3, 4, 5):  # top-p: a block more or less
            assert (found.counts - expected.counts).abs().max() <= 1
        else:
            assert torch.equal(lists_to_mask(found, k_blocks), lists_to_mask(expected, k_blocks))


@pytest.mark.gpu
def test_no_call_waits_for_the_gpu():
    scores = torch.randn(2, 3, 50, 512, device="cuda")
    calls = cuda_calls(scores, scores > 2)
    for call in calls:
        call()  # the first one compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
