"""What skipped blocks become."""

import pytest
import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.skipped import Drop, Reuse, Summarize

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


def test_a_choice_reads_as_in_a_recipe() -> None:
    assert str(Drop()) == "drop"
    assert str(Summarize()) == "summary"
    assert str(Reuse()) == "reuse ramp 0.04"
    assert str(Reuse(ratio=False)) == "reuse without ratio"


@pytest.mark.parametrize("ramp", [-0.1, float("nan"), float("inf")])
def test_a_ramp_out_of_range_is_refused(ramp: float) -> None:
    with pytest.raises(ValueError, match=r"^skipped\.ramp: .*; valid: "):
        Reuse(ramp=ramp)
