"""What skipped blocks become."""

import pytest
import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.skipped import Drop, Parts, Reuse, Summarize

LAYOUT = TokenLayout((2, 5, 7))


def outputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of 70 keys, values, and which 40 keys are selected."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(1, 2, 70, 70, generator=generator)
    return scores, torch.randn(1, 2, 70, 8, generator=generator), torch.arange(70) < 40


def attended(scores: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)


@pytest.mark.parametrize("ratio", [True, False])
def test_the_step_after_a_refresh_repeats_the_whole_output_when_nothing_changed(ratio: bool) -> None:
    scores, v, kept = outputs()
    whole, part = attended(scores, v), attended(scores.masked_fill(~kept, -torch.inf), v)
    reuse, slot = Reuse(ratio=ratio), {}
    reuse.keep(slot, whole, part)
    # Subtracted and added again: two roundings of numbers that are not larger than |v| is.
    assert (reuse.add(part[0], slot, 1) - whole[0]).abs().max() <= 4 * torch.finfo(torch.float32).eps * v.abs().max()
    assert (part[0] - whole[0]).abs().max() > 0.1


def test_the_ratio_is_the_share_of_the_denominator_and_the_residual_what_the_others_add() -> None:
    scores, v, kept = outputs()
    slot: dict[str, torch.Tensor] = {}
    Reuse().keep(slot, attended(scores, v), attended(scores.masked_fill(~kept, -torch.inf), v))
    weights = scores.double().softmax(dim=-1)
    assert torch.allclose(slot["ratio"].double(), weights[..., kept].sum(dim=-1), atol=1e-5)
    others = weights[..., ~kept] @ v[:, :, ~kept].double()
    assert torch.allclose(slot["residual"].double(), others, atol=1e-5)


def test_the_ratio_grows_with_every_sparse_step_but_the_first() -> None:
    scores, v, kept = outputs()
    whole, part = attended(scores, v), attended(scores.masked_fill(~kept, -torch.inf), v)
    slot: dict[str, torch.Tensor] = {}
    Reuse(ramp=0.04).keep(slot, whole, part)
    first, *later = (Reuse(ramp=0.04).add(part[0], slot, steps) for steps in (1, 2, 5))
    for out, n in zip(later, (1, 4), strict=True):
        assert torch.allclose(out - first, 0.04 * n * part[0], atol=1e-6)


@pytest.mark.parametrize("ratio", [True, False])
def test_the_size_of_what_is_kept_is_told_beforehand(ratio: bool) -> None:
    out, lse = torch.randn(1, 3, 70, 16).half(), torch.zeros(1, 3, 70)
    slot: dict[str, torch.Tensor] = {}
    Reuse(ratio=ratio).keep(slot, (out, lse), (out, lse - 1))
    assert slot["residual"].dtype is torch.float16
    assert Reuse(ratio=ratio).add(out, slot, 3).dtype is torch.float16
    told = Reuse(ratio=ratio).kept_bytes(LAYOUT, batch=1, heads=3, head_size=16, itemsize=2)
    assert told == sum(tensor.nbytes for tensor in slot.values())


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("part", [4, 7, 70, 100])
def test_parts_keep_the_mean_of_their_residuals(part: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(part)
    tables = torch.stack([torch.randperm(70, generator=generator) for _ in range(heads)])
    of_token = torch.empty_like(tables).scatter_(1, tables, torch.arange(70).expand_as(tables)) // part
    whole, sparse = torch.randn(2, 1, 2, 70, 8, generator=generator)
    reuse, slot, lse = Reuse(ratio=False, part=part), {}, torch.zeros(1, 2, 70)
    reuse.keep(slot, (whole, lse), (sparse, lse), Parts(tables, of_token))
    assert slot["residual"].nbytes == reuse.kept_bytes(LAYOUT, batch=1, heads=2, head_size=8, itemsize=4)
    out = reuse.add(sparse, slot, 2, Parts(tables, of_token))
    for head in range(2):
        # Token by token: the residuals of those that share a run.
        runs = of_token[min(head, heads - 1)]
        for token in range(70):
            mean = (whole - sparse)[0, head, runs == runs[token]].double().mean(dim=0)
            assert torch.allclose(out[0, head, token].double(), sparse[0, head, token] + mean, atol=1e-5)


def test_a_choice_reads_as_in_a_recipe() -> None:
    assert str(Drop()) == "drop"
    assert str(Summarize()) == "summary"
    assert str(Reuse()) == "reuse ramp 0.04"
    assert str(Reuse(ratio=False)) == "reuse without ratio"
    assert str(Reuse(ratio=False, summary=True, part=8)) == "reuse without ratio, with summaries, parts of 8"
    assert [each.summarizes for each in (Drop(), Summarize(), Reuse(), Reuse(ratio=False, summary=True))] == [
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("ramp", [-0.1, float("nan"), float("inf")])
def test_a_ramp_out_of_range_is_refused(ramp: float) -> None:
    with pytest.raises(ValueError, match=r"^skipped\.ramp: .*; valid: "):
        Reuse(ramp=ramp)


@pytest.mark.parametrize("settings", [{"summary": True}, {"part": 8}, {"part": 0, "ratio": False}])
def test_settings_that_go_without_ratio_only_are_refused_with_it(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"^skipped\.(summary|part): .*; valid: "):
        Reuse(**settings)  # type: ignore[arg-type]
