"""One attention call: dense or sparse by the schedule, computed and counted."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from sparse_dit.calls import attend, attend_again, plan
from sparse_dit.forecast import forecast, is_dense
from sparse_dit.kernels.ops import check_attention
from sparse_dit.kernels.replays import Replays
from sparse_dit.layout import TokenLayout
from sparse_dit.parallel import ALL_HERE, Heads
from sparse_dit.recipe import Recipe, load_recipe
from sparse_dit.state import UNASKED, RunState, Slot, Tally

__all__ = ["HEADS_FIRST", "TOKENS_FIRST", "Run", "is_dense", "plan", "sparse_attention"]

HEADS_FIRST = "b h s d"
TOKENS_FIRST = "b s h d"


class Run:
    """One enabled pipeline: its recipe, its state and its counts, shared by its transformers.

    Args:
        recipe: the method.
        strict: whether a forward whose calls differ from the plan, and a call that is dense though nobody asked for it
            (`UNASKED`), raise instead of warning once.
        timing: whether calls are timed.
    """

    def __init__(self, recipe: Recipe, *, strict: bool = False, timing: bool = False) -> None:
        self.recipe = recipe
        self.strict = strict
        self.state = RunState()
        self.tally = Tally(timing)
        self._replays = Replays()
        self._told: set[str] = set()
        self._affordable: tuple[Any, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Run":
        """A copied pipeline starts a run of its own."""
        return Run(self.recipe, strict=self.strict, timing=self.tally.timing)

    @property
    def reads_noise(self) -> bool:
        """Whether the noise level of the forward that begins must be known."""
        return self.recipe.schedule.reads_noise or self.state.context.step is None

    def begin_forward(self, layout: TokenLayout, noise: torch.Tensor, planned: int, transformer: int = 0) -> None:
        """A forward of a transformer begins.

        Args:
            layout: its tokens.
            noise: its noise level in [0, 1], any shape; the largest one counts. Read only when something depends on it
                (`reads_noise`), because reading waits for the GPU.
            planned: number of self-attention layers.
            transformer: as `RunState.begin_forward`.
        """
        self.state.begin_forward(layout, float(noise.max()) if self.reads_noise else None, transformer)
        self.tally.begin_forward(planned)

    def end_forward(self) -> None:
        """A forward of a transformer ends; its calls are compared with the plan.

        Raises:
            RuntimeError: they differ and the run is strict.
        """
        planned, made = self.tally.end_forward()
        if planned == made:
            return
        message = (
            f"{made} self-attention calls were made where {planned} were planned: a cache skips layers, "
            "or processors were replaced after sparse attention was enabled"
        )
        self._tell(RuntimeError(message))

    def _tell(self, error: Exception) -> None:
        """Raise if the run is strict, else warn, once."""
        if self.strict:
            raise error
        if str(error) not in self._told:
            self._told.add(str(error))
            warnings.warn(str(error), RuntimeWarning, stacklevel=3)

    def count_dense(self, reason: str) -> None:
        """Count a call that runs as the model made it.

        Raises:
            ValueError: nobody asked for it (`UNASKED`) and the run is strict.
        """
        if reason in UNASKED:
            self._tell(ValueError(UNASKED[reason]))
        self.tally.count_dense(reason)

    def call(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        axes: str,
        scale: float | None,
        refusal: str | None,
        dense: Callable[[], torch.Tensor],
        heads: Heads = ALL_HERE,
    ) -> torch.Tensor:
        """Compute one self-attention call.

        Args:
            layer: index of the self-attention layer.
            q, k, v: tensors with the axes `axes`.
            axes: `HEADS_FIRST` or `TOKENS_FIRST`.
            scale: factor on the scores; `None` is 1 / sqrt(d).
            refusal: why the call cannot be sparse, if so.
            dense: the call as the model would have made it.
            heads: which of the layer's heads the call has.

        Returns:
            The output with the axes `axes` and the dtype of q.

        Raises:
            ValueError: layers would keep more than the recipe's limit, told before the first sparse call; or as
                `count_dense`.
        """
        tokens = q.shape[axes.split().index("s")]
        reason = refusal or self.dense_reason(layer, tokens)
        if self.recipe.state_limit is not None and refusal is None:
            self._check_state(q if axes == HEADS_FIRST else q.transpose(1, 2), heads)
        with self.tally.timed(q.device):
            if reason is not None:
                self.count_dense(reason)
                return dense()
            state, layout = self.state, self.state.layout
            assert layout is not None
            slot = state.slot(layer, (layout, axes, q.shape, q.dtype, q.device))
            done = attend_again(
                self._replays, self.recipe, layout, q, k, v, tokens_first=axes == TOKENS_FIRST,
                scale=scale, layer=layer, step=state.step, slot=slot, spread=heads,
            )  # fmt: skip
            if done.whole:
                self.tally.count_dense("refresh", done.backend)
            else:
                self.tally.count_sparse(done.density, done.backend)
            return done.out

    def _check_state(self, q: torch.Tensor, heads: Heads) -> None:
        """Raises ValueError when layers would keep more than the recipe allows; q is [B, H, S, D]."""
        state = self.state
        asked = (state.layout, state.branches, q.shape, q.dtype)
        if state.layout is None or self._affordable == asked:
            return
        batch, here, tokens, size = q.shape
        shape = (batch, heads.total(here), tokens, size)
        told = forecast(
            self.recipe, state.layout, layers=self.tally.planned, branches=state.branches, shape=shape, dtype=q.dtype
        )
        replace(told, kept_bytes=told.kept_bytes // heads.ranks).check(self.recipe)
        self._affordable = asked

    def dense_reason(self, layer: int, tokens: int) -> str | None:
        """Why a call of a layer over so many tokens is dense where the state stands, or `None` when it is sparse."""
        recipe, state = self.recipe, self.state
        if is_dense(recipe):
            return "recipe"
        if state.layout is None or state.layout.length != tokens:
            return "unknown_grid"
        if tokens <= max(recipe.block_q, recipe.block_k):
            return "short"
        return recipe.schedule.dense_reason(state.step, state.noise, layer)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    grid: tuple[int, int, int],
    recipe: str | Path | Mapping[str, Any] | Recipe = "radial",
    text_before: int = 0,
    text_after: int = 0,
    scale: float | None = None,
) -> torch.Tensor:
    """Sparse self-attention for a model of your own; the recipe's schedule is yours to follow.

    Every call stands for itself: nothing is kept from one to the next, so what a recipe does at a refresh it does in
    every call. Recipes that search (`mass`) or cache (`skipped: reuse`) then compute whole attention.

    Args:
        q, k, v: [B, H, S, D], fp16, bf16 or fp32; S = text_before + T * H * W + text_after.
        grid: (T, H, W), the video tokens, flattened with W fastest.
        recipe: as `load_recipe`.
        text_before: text tokens in front of the video tokens.
        text_after: text tokens behind the video tokens.
        scale: factor on the scores; `None` is 1 / sqrt(D).

    Returns:
        [B, H, S, D] in the dtype of q.

    Raises:
        ValueError: shapes that do not fit together, or a recipe that `load_recipe` refuses.
    """
    layout = TokenLayout(cast("tuple[int, int, int]", tuple(grid)), text_before, text_after)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape != q.shape or tensor.ndim != 4 or tensor.shape[2] != layout.length:
            raise ValueError(
                f"{name}: shape {list(tensor.shape)}; valid: [B, H, {layout.length}, D] for grid {layout.grid} and "
                f"{text_before} + {text_after} text tokens, the same for q, k and v"
            )
    recipe = load_recipe(recipe)
    if is_dense(recipe):
        check_attention(q, k, v, scale)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return attend(recipe, layout, q, k, v, scale=scale, layer=0, step=0, slot=Slot()).out
