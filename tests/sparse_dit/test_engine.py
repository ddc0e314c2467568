"""One attention call: what is computed, and when the model's own backend is left to it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparse_dit.engine import HEADS_FIRST, TOKENS_FIRST, Run, plan, sparse_attention
from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.oracle import oracle_attention
from sparse_dit.layout import TokenLayout, text_blocks
from sparse_dit.orders.tables import place_text
from sparse_dit.recipe import Recipe
from sparse_dit.schedule import Schedule
from sparse_dit.selection import Every, Pooled, Radial
from sparse_dit.state import UNASKED, Context

GRID = (5, 5, 9)  # 45 tokens a frame: no multiple of any block
RAGGED = TokenLayout(GRID, text_before=3, text_after=11)


def qkv(layout: TokenLayout, heads: int = 2, width: int = 64, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, heads, layout.length, width, generator=generator) for _ in range(3))


def rounding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Bound on the difference of two fp32 evaluations of softmax(q k / sqrt(d)) v.

    A score is off by at most d eps |q| |k| / sqrt(d), which moves a probability by twice that factor; the sum over the
    tokens adds eps a term; all of it times the largest value; and two evaluations may err in opposite directions.
    """
    eps = torch.finfo(torch.float32).eps
    score = eps * q.shape[-1] ** 0.5 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    return 2 * (2 * score + q.shape[2] * eps) * float(v.abs().max())


def recipe(selection: Any = None, block: int = 16, **schedule: Any) -> Recipe:
    return Recipe(selection=selection or Radial(), schedule=Schedule(**schedule), block_q=block, block_k=block)


def running(chosen: Recipe, layout: TokenLayout = RAGGED, step: int = 0, noise: float = 0.5) -> Run:
    run = Run(chosen)
    run.state.context = Context("cond", step)
    run.begin_forward(layout, torch.tensor(noise), planned=1)
    return run


def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("block_q", [16, 64])
@pytest.mark.parametrize("block_k", [16, 32])
def test_sparse_attention_computes_the_selected_blocks_and_no_other(block_q: int, block_k: int) -> None:
    q, k, v = qkv(RAGGED)
    chosen = Recipe(selection=Radial(full_distance=0, min_width=0), block_q=block_q, block_k=block_k)
    mask = Radial(full_distance=0, min_width=0).select(RAGGED, block_q, block_k, None, 2)
    assert not mask.all()
    out = sparse_attention(q, k, v, grid=GRID, recipe=chosen, text_before=3, text_after=11)
    expected, _ = oracle_attention(q, k, v, mask[None], block_q, block_k, None)
    assert (out - expected).abs().max() <= rounding(q, k, v)


def test_density_one_agrees_with_dense_attention_to_rounding() -> None:
    q, k, v = qkv(RAGGED)
    out = sparse_attention(q, k, v, grid=GRID, recipe=recipe(Radial(density=1.0)), text_before=3, text_after=11)
    assert (out - stock(q, k, v)()).abs().max() <= rounding(q, k, v)


def test_text_queries_see_everything_and_everything_sees_text() -> None:
    layout = TokenLayout((12, 4, 4), text_before=16, text_after=16)
    q, k, v = qkv(layout)
    chosen = recipe(Radial(density=0.1))
    out = sparse_attention(q, k, v, grid=layout.grid, recipe=chosen, text_before=16, text_after=16)
    text = [*range(16), *range(layout.length - 16, layout.length)]
    difference = (out - stock(q, k, v)()).abs()
    assert difference[:, :, text].max() <= rounding(q, k, v)
    assert difference[:, :, 16:-16].max() > 0.05
    assert plan(chosen, layout, q.device).density < 0.6


def test_a_planted_pattern_is_found_where_it_is_kept_and_lost_where_it_is_not() -> None:
    # Every token looks for the token at its own place in the next frame.
    layout = TokenLayout((6, 8, 8))
    generator = torch.Generator().manual_seed(0)
    k = F.normalize(torch.randn(1, 1, layout.length, 64, generator=generator), dim=-1)
    v = torch.randn(1, 1, layout.length, 64, generator=generator)
    q = 400.0 * k.roll(-layout.frame_tokens, dims=2)
    inner = slice(0, layout.length - layout.frame_tokens)
    found = sparse_attention(q, k, v, grid=layout.grid, recipe=recipe(Radial(decay=0.01)))
    lost = sparse_attention(q, k, v, grid=layout.grid, recipe=recipe(Radial(0.01, full_distance=0, min_width=0)))
    target = v.roll(-layout.frame_tokens, dims=2)
    assert (found - target)[:, :, inner].abs().mean() < 1e-3
    assert (lost - target)[:, :, inner].abs().mean() > 0.5


@dataclass(frozen=True)
class Shuffled:
    """An order that moves every video token, each head's differently."""

    def table(self, layout: TokenLayout, heads: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        video = torch.stack([torch.randperm(layout.video_tokens, generator=generator) for _ in range(heads)])
        return place_text(layout, video)


@dataclass(frozen=True)
class Striped:
    """A static selection that differs by head: head h keeps the key blocks j with i + j + h even."""

    def select(
        self, layout: TokenLayout, block_q: int, block_k: int, table: torch.Tensor | None, heads: int
    ) -> torch.Tensor:
        rows, columns = -(-layout.length // block_q), -(-layout.length // block_k)
        head, row, column = torch.arange(heads), torch.arange(rows), torch.arange(columns)
        return (head[:, None, None] + row[:, None] + column) % 2 == 0


def test_an_order_moves_tokens_into_blocks_and_back() -> None:
    q, k, v = qkv(RAGGED)
    everything = Recipe(order=Shuffled(), selection=Pooled(density=1.0), block_q=16, block_k=16)
    out = sparse_attention(q, k, v, grid=GRID, recipe=everything, text_before=3, text_after=11)
    assert (out - stock(q, k, v)()).abs().max() <= rounding(q, k, v)
    half = Recipe(order=Shuffled(), selection=Striped(), block_q=16, block_k=16)
    out = sparse_attention(q, k, v, grid=GRID, recipe=half, text_before=3, text_after=11)
    table = Shuffled().table(RAGGED, 2)
    mask = with_text(Striped().select(RAGGED, 16, 16, None, 2), RAGGED, 16)
    q, k, v, out = (gather_tokens(x, table) for x in (q, k, v, out))
    expected, _ = oracle_attention(q, k, v, mask[None], 16, 16, None)
    assert (out - expected).abs().max() <= rounding(q, k, v)


def with_text(mask: torch.Tensor, layout: TokenLayout, block: int) -> torch.Tensor:
    rows, columns = text_blocks(layout, block, block)
    return mask | rows[:, None] | columns


def test_the_recipe_dense_is_stock_attention() -> None:
    q, k, v = qkv(RAGGED)
    out = sparse_attention(q, k, v, grid=GRID, recipe="dense", text_before=3, text_after=11)
    assert torch.equal(out, stock(q, k, v)())


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    tensors = dict(zip("qkv", qkv(RAGGED), strict=True))
    tensors[name] = tensors[name][:, :, 1:] if name != "q" else tensors[name][0]
    with pytest.raises(ValueError, match=r"^[qkv]: shape .*; valid: ") as caught:
        sparse_attention(**tensors, grid=GRID, text_before=3, text_after=11)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dense", "radial"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grid": (*GRID, 9)}, "grid: "),
        ({"grid": GRID[:2]}, "grid: "),
        ({"scale": -1.0}, "scale: -1.0; valid: a positive finite number"),
        ({"dtype": torch.int64}, "q: torch.int64; valid: one of "),
    ],
)
def test_what_no_attention_can_be_computed_of_is_refused_by_all_recipes(name: str, changed: Any, message: str) -> None:
    dtype = changed.get("dtype", torch.float32)
    settings = {"grid": GRID, "recipe": name} | {key: value for key, value in changed.items() if key != "dtype"}
    q, k, v = (x.to(dtype) for x in qkv(RAGGED))
    with pytest.raises(ValueError, match=f"^{message}"):
        sparse_attention(q, k, v, text_before=3, text_after=11, **settings)


def test_plans_are_cached_by_what_they_depend_on() -> None:
    device = torch.device("cpu")
    first = plan(recipe(), RAGGED, device)
    assert plan(recipe(dense_steps=4), RAGGED, device) is first
    assert plan(recipe(block=32), RAGGED, device) is not first
    assert plan(recipe(Radial(decay=0.3)), RAGGED, device) is not first
    assert plan(recipe(), TokenLayout(GRID), device) is not first


@pytest.mark.parametrize("axes", [HEADS_FIRST, TOKENS_FIRST])
def test_a_call_keeps_the_axes_of_its_caller(axes: str) -> None:
    q, k, v = qkv(RAGGED)
    run = running(recipe(Radial(density=0.4)))
    moved = [x if axes == HEADS_FIRST else x.transpose(1, 2) for x in (q, k, v)]
    out = run.call(0, *moved, axes=axes, scale=None, refusal=None, dense=pytest.fail)  # type: ignore[arg-type]
    run.end_forward()
    expected = sparse_attention(q, k, v, grid=GRID, recipe=run.recipe, text_before=3, text_after=11)
    assert torch.equal(out if axes == HEADS_FIRST else out.transpose(1, 2), expected)
    summary = run.tally.summary()
    assert (summary.planned, summary.made, summary.sparse, summary.backend) == (1, 1, 1, "host")
    assert summary.density == summary.run_density == plan(run.recipe, RAGGED, q.device).density


@pytest.mark.filterwarnings("ignore:hidden_states")
@pytest.mark.parametrize(
    ("chosen", "layout", "reason"),
    [
        (recipe(Every()), RAGGED, "recipe"),
        (recipe(), TokenLayout(GRID), "unknown_grid"),
        (recipe(block=128), TokenLayout((1, 8, 16)), "short"),
        (recipe(dense_steps=1), RAGGED, "dense_steps"),
        (recipe(dense_above=0.4), RAGGED, "dense_above"),
        (recipe(dense_layers=(0,)), RAGGED, "dense_layers"),
    ],
)
def test_dense_calls_run_as_the_model_made_them(chosen: Recipe, layout: TokenLayout, reason: str) -> None:
    q, k, v = qkv(layout if reason != "unknown_grid" else RAGGED)
    run = running(chosen, layout)
    expected = stock(q, k, v)()
    out = run.call(0, q, k, v, axes=HEADS_FIRST, scale=None, refusal=None, dense=lambda: expected)
    assert out is expected
    run.end_forward()
    assert run.tally.summary().dense == {reason: 1}


def test_dense_calls_that_nobody_asked_for_are_told_once_or_raise() -> None:
    q, k, v = qkv(RAGGED)
    for reason, message in UNASKED.items():
        call: dict[str, Any] = {"axes": HEADS_FIRST, "scale": None, "refusal": reason, "dense": lambda: q}
        run = running(recipe())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert run.call(0, q, k, v, **call) is run.call(0, q, k, v, **call) is q
        assert [str(entry.message) for entry in caught] == [message]
        assert "valid: " in message
        strict = Run(recipe(), strict=True)
        strict.begin_forward(RAGGED, torch.tensor(0.5), planned=1)
        with pytest.raises(ValueError, match=message[:40]):
            strict.call(0, q, k, v, **call)


def test_a_refused_call_is_dense_and_counted() -> None:
    q, k, v = qkv(RAGGED)
    run = running(recipe())
    assert run.call(0, q, k, v, axes=HEADS_FIRST, scale=None, refusal="mask", dense=lambda: q) is q
    run.end_forward()
    assert run.tally.summary().dense == {"mask": 1}


def test_the_noise_level_is_read_only_when_something_depends_on_it() -> None:
    assert running(recipe()).state.noise is None
    assert running(recipe(dense_above=0.4), noise=0.25).state.noise == 0.25
    run = Run(recipe())
    run.begin_forward(RAGGED, torch.tensor([[0.0, 0.75]]), planned=0)
    assert run.state.noise == 0.75


def test_missing_calls_warn_once_or_raise() -> None:
    run = running(recipe())
    with pytest.warns(RuntimeWarning, match="0 self-attention calls were made where 1 were planned"):
        run.end_forward()
    run.begin_forward(RAGGED, torch.tensor(0.5), planned=1)
    run.end_forward()
    strict = Run(recipe(), strict=True)
    strict.begin_forward(RAGGED, torch.tensor(0.5), planned=2)
    with pytest.raises(RuntimeError, match="0 self-attention calls were made where 2 were planned"):
        strict.end_forward()
