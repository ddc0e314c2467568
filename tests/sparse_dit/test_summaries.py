"""Recipes whose skipped blocks enter the softmax as summaries: any selection, any order, text, forecast."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparse_dit import apart
from sparse_dit.apart import attend_chosen
from sparse_dit.calls import attend, plan
from sparse_dit.forecast import forecast
from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.lists import lists_to_mask, mask_to_lists
from sparse_dit.kernels.oracle import oracle_summary_attention
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Axes, Clusters, Hilbert, Rows, Tiles, TimeMajor
from sparse_dit.recipe import Recipe, load_recipe
from sparse_dit.schedule import Schedule
from sparse_dit.selection import Band, Chosen, Gate, HeadTypes, Mass, Pooled, Radial, Window
from sparse_dit.skipped import Drop, Reuse, Summarize
from sparse_dit.state import Slot

LAYOUT = TokenLayout((3, 6, 10), text_before=3, text_after=11)
TEXT = [*range(3), *range(183, 194)]
GATE = Gate(threshold=0.6, spans=3, tiles=(2, 2), cuboids=(2, 2, 2))
CASES = [
    (Radial(density=0.4), Rows()),
    (Band(), TimeMajor()),
    (Window(density=0.4), Tiles((1, 3, 4))),
    (Pooled(density=0.3), Hilbert()),
    (Pooled(density=0.3, per="head"), Axes(("hwt", "wth"))),
    (Pooled(tau=0.5), Rows()),
    (Pooled(top_p=0.5), Clusters(queries=5, keys=7)),
    (Mass(density=0.3), Tiles((1, 3, 4))),
    (GATE, Rows()),
    (HeadTypes(kept=0.3, rows=16), Rows()),
]


def qkv(layout: TokenLayout = LAYOUT, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, 2, layout.length, 64, generator=generator)
    return 3 * q, k, v


def rounding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """As `rounding` of test_engine: bound on the difference of two fp32 evaluations of attention."""
    eps = torch.finfo(torch.float32).eps
    score = eps * q.shape[-1] ** 0.5 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    return 2 * (2 * score + q.shape[2] * eps) * float(v.abs().max())


def recipe(selection: Any, **choices: Any) -> Recipe:
    return Recipe(**{"selection": selection, "skipped": Summarize(), "block_q": 16, "block_k": 16, **choices})


def one_call(chosen: Recipe, inputs: tuple[torch.Tensor, ...], slot: Slot, step: int = 1) -> Any:
    return attend(chosen, LAYOUT, *inputs, scale=None, layer=0, step=step, slot=slot)


@pytest.mark.parametrize(("selection", "order"), CASES, ids=lambda choice: type(choice).__name__)
def test_what_a_call_skips_is_summarized_and_text_is_exact(
    selection: Any, order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the oracle along the lists that the selection chose, in the order that blocks have."""
    calls = []
    kernel = apart.block_sparse_attention

    def spy(*tensors: Any, **options: Any) -> Any:
        calls.append((tensors, options, kernel(*tensors, **options)))
        return calls[-1][2]

    monkeypatch.setattr(apart, "block_sparse_attention", spy)
    q, k, v = qkv()
    slot = Slot()
    chosen = recipe(selection, order=order)
    if isinstance(selection, Mass):
        assert one_call(chosen, (q, k, v), slot, step=0).whole
    done = one_call(chosen, (q, k, v), slot)
    (*tensors, blocks), options, (out, _) = calls[-1]
    assert options["skipped"] == "summary"
    if options.get("order") is not None:
        tensors, out = [gather_tokens(x, options["order"]) for x in tensors], gather_tokens(out, options["order"])
    expected, _ = oracle_summary_attention(*tensors, lists_to_mask(blocks, -(-LAYOUT.length // 16)), 16, 16)
    assert (out - expected).abs().max() <= rounding(q, k, v)
    difference = (done.out - F.scaled_dot_product_attention(q, k, v)).abs()
    assert difference[:, :, TEXT].max() <= rounding(q, k, v)
    assert difference.max() > 1e-3
    assert float(done.density) < 1.0


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
def test_a_precision_changes_less_than_summaries_do(precision: str) -> None:
    inputs = qkv()
    native, low, drop = (
        one_call(recipe(Pooled(density=0.2), precision=how, skipped=skipped), inputs, Slot()).out
        for how, skipped in (("native", Summarize()), (precision, Summarize()), ("native", Drop()))
    )
    assert 0.0 < (low - native).norm() < (drop - native).norm()


def test_the_dense_output_is_nearer_than_without_summaries() -> None:
    """Neighbours alike, as video tokens are: half of what dropping loses comes back at least."""
    q, k, v = qkv()
    k, v = (0.3 * x + torch.randn(2, 2, 13, 64).repeat_interleave(16, dim=2)[:, :, :194] for x in (k, v))
    dense = F.scaled_dot_product_attention(q, k, v)
    errors = [
        float((one_call(recipe(Pooled(density=0.3), skipped=skipped), (q, k, v), Slot()).out - dense).norm())
        for skipped in (Summarize(), Drop())
    ]
    assert errors[0] < 0.5 * errors[1]


def test_heads_that_are_left_out_stay_zero() -> None:
    q, k, v = qkv()
    mask = torch.eye(13, dtype=torch.bool)[None, None]
    chosen = Chosen(mask_to_lists(mask, 16, 16), None, heads=torch.tensor([1]))
    out, lse = attend_chosen(q, k, v, chosen, scale=0.125, precision="native", skipped="summary")
    expected, sums = oracle_summary_attention(q[:, 1:], k[:, 1:], v[:, 1:], mask, 16, 16)
    assert (out[:, :1] == 0).all()
    assert (out[:, 1:] - expected).abs().max() <= rounding(q, k, v)
    assert torch.allclose(lse[:, 1:].double(), sums, atol=1e-4)


def test_blocks_are_kept_between_refreshes_and_summaries_are_not() -> None:
    inputs = qkv(batch=1)
    slots = {}
    for skipped in (Summarize(), Drop()):
        chosen = recipe(Pooled(density=0.3), skipped=skipped, schedule=Schedule(refresh_every=3))
        slots[skipped] = Slot()
        first = one_call(chosen, inputs, slots[skipped], step=0)
        assert torch.equal(one_call(chosen, inputs, slots[skipped], step=1).out, first.out)
    assert slots[Summarize()].nbytes == slots[Drop()].nbytes


def told(chosen: Recipe, layout: TokenLayout) -> Any:
    return forecast(chosen, layout, layers=1, branches=1, shape=(1, 2, layout.length, 64), dtype=torch.float32)


def test_the_forecast_tells_the_keys_that_summaries_add() -> None:
    layout = TokenLayout((4, 8, 8), text_after=16)  # whole blocks only
    chosen = recipe(Radial(density=0.4))
    blocks = plan(chosen, layout, torch.device("cpu")).blocks
    skipped = int((~lists_to_mask(blocks, 17)).sum()) * blocks.block_q
    assert told(chosen, layout).summary_density == pytest.approx(skipped / layout.length**2)
    behind = recipe(Radial(density=0.4), skipped=Reuse(ratio=False, summary=True), schedule=Schedule(refresh_every=3))
    assert told(behind, layout).summary_density == told(chosen, layout).summary_density
    assert told(recipe(Radial(density=0.4), skipped=Drop()), layout).summary_density == 0.0
    assert told(load_recipe("sol"), layout).summary_density == 1 / 64  # the content decides: the most it can be
