"""The samples of a batch: what is text, grid and padding in the sequence of each, and calls that leave padding out.

Models mark padding by a mask, with which no fast attention works. Here it is cut off instead: the tokens that count
are attended to exactly as under the mask, each sample by itself where samples differ in length.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from sparse_dit.engine import Run, is_dense
from sparse_dit.layout import TokenLayout
from sparse_dit.parallel import Shards, shards_of
from sparse_dit.sites import Site, fake_tokens_first, model_attention, tokens_first

Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""The call as the model would have made it, of q, k, v and mask."""


@dataclass(frozen=True)
class Sample:
    """Where the tokens of one sample stand: text, padding, grid, text, and padding up to the end of the sequence.

    Args:
        layout: the tokens that count.
        gap: padding tokens between the text in front and the grid.
    """

    layout: TokenLayout
    gap: int = 0

    def spans(self) -> tuple[tuple[int, int], ...]:
        """The stretches (from, length) of the sequence that count."""
        before, length = self.layout.text_before, self.layout.length
        return ((0, before), (before + self.gap, length - before)) if self.gap else ((0, length),)


@dataclass
class Tokens:
    """What the layers of one transformer know of the forward that runs, beyond what the run's state holds.

    Attributes:
        read: whether anything below is used at all; else a forward's shapes tell everything.
        removes_masks: whether a mask may be removed, because it tells nothing but the padding in `samples`.
        apart: whether processors make one call a sample.
        samples: where the tokens stand, one entry a sample, or a single one for all.
        refusal: why the whole forward stays dense, or `None`.
        stretches: tokens of each stretch of the sequence that several processes share by itself, paddings included, in
            order; `None` where that is not known.
    """

    read: bool = False
    removes_masks: bool = False
    apart: bool = False
    samples: tuple[Sample, ...] = ()
    refusal: str | None = None
    stretches: tuple[int, ...] | None = None


class Layer(Site):
    """A site that cuts padding off before a call and knows the samples of a batch apart.

    Args:
        layer, run, clock, home: as `Site`.
        tokens: of the forward that runs, one object for all layers of a transformer.
        alone: whether the layer sees the grid without any text.
    """

    def __init__(self, layer: int, run: Run, clock: torch.Tensor, home: str, tokens: Tokens, alone: bool) -> None:
        super().__init__(layer, run, clock, home)
        self.tokens = tokens
        self.alone = alone

    def __deepcopy__(self, memo: dict[int, Any]) -> "Layer":
        """As `Site.__deepcopy__`."""
        run, clock = copy.deepcopy(self.run, memo), copy.deepcopy(self.clock, memo)
        return Layer(self.layer, run, clock, self.home, copy.deepcopy(self.tokens, memo), self.alone)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        index: int,
        axes: str,
        scale: float | None,
        backend: str,
        refusal: str | None,
        dense: Dense,
        processes: Any = None,
        dense_here: Dense | None = None,
    ) -> torch.Tensor:
        """Compute a call, trimmed where the tokens say so; traceable.

        Args:
            q, k, v: tensors with the axes `axes`.
            mask: the mask that the model gave to the call.
            index: which of the layer's calls in this forward it is.
            axes, scale, backend, refusal: as `Site.call`.
            dense: the call as the model would have made it.
            processes: the process group over which the sequence is spread, `None` where all of it is here; `axes` are
                then `TOKENS_FIRST`.
            dense_here: with `processes`, the model's attention of whole sequences, which asks no other process.

        Returns:
            The output with the axes `axes`; zeros where the sequence is padding.
        """
        if index > 0 and refusal == "cross_attention":
            # An adapter's own attention, to the tokens of an image for example, next to the self-attention.
            return dense(q, k, v, mask)
        if mask is not None and not self.tokens.removes_masks:
            refusal = refusal or "mask"
        if processes is not None and dense_here is not None:
            refusal, shards = self._share(q, processes, refusal)
            if shards is not None:
                self.group = shards.name
                q, k, v = shards.gather(q, k, v)
                mask = None if mask is None else shards.gather_mask(mask)
                options: dict[str, Any] = {"index": index, "axes": axes, "scale": scale, "backend": backend}
                return shards.scatter(self.attend(q, k, v, mask, **options, refusal=None, dense=dense_here))
        if refusal is not None or not self.tokens.read:
            whole = functools.partial(dense, q, k, v, mask)
            return self.call(q, k, v, axes=axes, scale=scale, backend=backend, refusal=refusal, dense=whole)
        if torch.compiler.is_compiling():
            told = (axes, scale, backend, index, self.group)
            return cast(torch.Tensor, _attend_read(q, k, v, mask, self.slot, self.clock, *told))
        return self.attend_read(q, k, v, mask, axes=axes, scale=scale, index=index, dense=dense)

    def attend_read(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        axes: str,
        scale: float | None,
        index: int,
        dense: Dense,
    ) -> torch.Tensor:
        """Compute a call by what was read of the forward's tokens; arguments as `attend`."""
        tokens, call = self.tokens, functools.partial(self.call, axes=axes, scale=scale, backend="")
        if tokens.refusal is not None or is_dense(self.run.recipe):
            return call(q, k, v, refusal=tokens.refusal, dense=functools.partial(dense, q, k, v, mask))
        samples = tokens.samples
        if tokens.apart:
            samples = (samples[index % len(samples)],)
        elif self.alone:
            samples = (Sample(replace(samples[0].layout, text_before=0, text_after=0)),)
        axis = axes.split().index("s")
        if len(samples) == 1 and (mask is None or samples[0].layout.length == q.shape[axis]):
            with self._sample(samples[0], index if tokens.apart else None):
                return call(q, k, v, refusal=None, dense=functools.partial(dense, q, k, v, None))
        ends = (begin + length for sample in samples for begin, length in sample.spans())
        # A cache may have taken samples out of the batch after the forward's arguments were read.
        if mask is None or len(samples) not in (1, q.shape[0]) or max(ends) > q.shape[axis]:
            for _ in samples[1:]:  # planned as one call a sample
                self.run.count_dense("unknown_grid")
            return call(q, k, v, refusal="unknown_grid", dense=functools.partial(dense, q, k, v, mask))
        # Padding queries feed only padding, so what they get does not matter.
        out = q.new_zeros(q.shape)
        for number, sample in enumerate(samples):
            of_sample = (x if len(samples) == 1 else x[number : number + 1] for x in (q, k, v))
            trimmed = [_cut(x, sample.spans(), axis) for x in of_sample]
            with self._sample(sample, number if len(samples) > 1 else None):
                tq, tk, tv = trimmed
                part = call(tq, tk, tv, refusal=None, dense=functools.partial(dense, tq, tk, tv, None))
            target, start = out if len(samples) == 1 else out[number : number + 1], 0
            for begin, length in sample.spans():
                target.narrow(axis, begin, length).copy_(part.narrow(axis, start, length))
                start += length
        return out

    def _share(self, q: torch.Tensor, processes: Any, refusal: str | None) -> tuple[str | None, Shards | None]:
        """Why a call of which this process has some tokens must run as the model made it, or how all have them."""
        tokens = self.tokens
        if refusal is not None:
            return refusal, None
        if tokens.stretches is None or tokens.apart or self.alone:
            return "shared_text", None
        shards = shards_of(processes, tokens.stretches)
        if shards.lengths[shards.rank] != q.shape[1]:
            return "unknown_shares", None
        if q.shape[2] % len(shards.pieces):
            return "uneven_heads", None
        if torch.compiler.is_compiling():
            return None, shards  # whether it is dense is known when the graph runs
        layout = self.run.state.layout
        reason = tokens.refusal or self.run.dense_reason(self.layer, 0 if layout is None else layout.length)
        if reason is not None and tokens.refusal is None and not is_dense(self.run.recipe):
            for _ in tokens.samples[1:]:  # planned as one call a sample
                self.run.count_dense(reason)
        return (None, shards) if reason is None else (reason, None)

    @contextmanager
    def _sample(self, sample: Sample, number: int | None) -> Iterator[None]:
        """The run's state for a call of one sample; what its layers keep between steps is its own."""
        state = self.run.state
        layout, branch = state.layout, state.branch
        state.layout = sample.layout
        if number is not None:
            state.branch = f"{branch}[{number}]"
        try:
            yield
        finally:
            state.layout, state.branch = layout, branch


def _cut(x: torch.Tensor, spans: tuple[tuple[int, int], ...], axis: int) -> torch.Tensor:
    parts = [x.narrow(axis, begin, length) for begin, length in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


@torch.library.custom_op("sparse_dit::attend_read", mutates_args=())
def _attend_read(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    slot: torch.Tensor,
    clock: torch.Tensor,
    axes: str,
    scale: float | None,
    backend: str,
    index: int,
    group: str,
) -> torch.Tensor:
    layer = cast(Layer, Site.find(slot))
    layer.group = group
    dense = functools.partial(model_attention, layer, axes=axes, scale=scale, backend=backend)
    out = layer.attend_read(q, k, v, mask, axes=axes, scale=scale, index=index, dense=dense)
    return tokens_first(out, axes)


@_attend_read.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    slot: torch.Tensor,
    clock: torch.Tensor,
    axes: str,
    scale: float | None,
    backend: str,
    index: int,
    group: str,
) -> torch.Tensor:
    return fake_tokens_first(q, axes)
