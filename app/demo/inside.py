"""A run looked into: density and kept attention mass by layer and step, and the block mask of every sparse call."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_dit.eval.kept import Kept
from sparse_dit.eval.pair import plan_arguments
from sparse_dit.eval.probe import Place, probed
from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.lists import lists_to_mask
from sparse_dit.kernels.ops import OPERATORS
from sparse_dit.orders import Clusters
from sparse_dit.pipelines.generate import Request, call_arguments, generate
from sparse_dit.pipelines.patch import explain, sparse
from sparse_dit.recipe import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ROWS = 16  # query rows sampled in each call
MASK_BYTES = 2**28  # kept on disk for a run; the calls behind that have none

Table = list[list[float | None]]
"""[steps][layers]; None where the calls were dense."""

Tokens = npt.NDArray[np.bool_]
"""Of the grid [T, H, W]."""


class Stored(NamedTuple):
    """Where the mask of a call lies.

    Attributes:
        mask: file with bits of [H or 1, QB, KB].
        order: file with token ids int32 [H or 1, S] in the order in which they enter blocks; None as they stand.
        key_blocks: KB.
        block_q, block_k: tokens of a block.
    """

    mask: Path
    order: Path | None
    key_blocks: int
    block_q: int
    block_k: int


@dataclass
class Inside:
    """What was found.

    Attributes:
        folder: where the masks lie.
        grid: (T, H, W), video tokens.
        text_before: text tokens in front of them.
        steps, layers, heads: of the run, layers of all transformers together; no heads where every call was dense.
        density: computed tile area over full area, mean over heads and branches.
        mass: the share of whole attention's mass that was computed, on sampled query rows.
        missing: why calls have no mask, where that is so; else empty.
        masks: of the first branch, by (step, layer).
    """

    folder: Path
    grid: tuple[int, int, int]
    text_before: int
    steps: int
    layers: int = 0
    heads: int = 0
    density: Table = field(default_factory=list)
    mass: Table = field(default_factory=list)
    missing: str = ""
    masks: dict[tuple[int, int], Stored] = field(default_factory=dict)

    def computed(self, step: int, layer: int, head: int, query: tuple[int, int, int]) -> tuple[Tokens, Tokens] | None:
        """What the call of a step and layer computes for one query.

        Args:
            step: denoising step from 0.
            layer: self-attention layer from 0.
            head: attention head from 0.
            query: (t, h, w) of the token in the grid.

        Returns:
            The tokens that are computed as keys, and those that share the query's block; None where no mask is kept:
            the call was dense, or `missing` says why.

        Raises:
            ValueError: head or query lies outside.
        """
        stored = self.masks.get((step, layer))
        if stored is None:
            return None
        if not 0 <= head < self.heads:
            raise ValueError(f"head: {head}; valid: 0 to {self.heads - 1}")
        if not all(0 <= place < side for place, side in zip(query, self.grid, strict=True)):
            raise ValueError(f"query: {query}; valid: inside the grid {self.grid}")
        bits = np.load(stored.mask, allow_pickle=False)
        mask = np.unpackbits(bits, axis=-1, count=stored.key_blocks).astype(bool)
        token = self.text_before + int(np.ravel_multi_index(query, self.grid))
        if stored.order is None:
            position = np.arange(self.text_before + math.prod(self.grid))
        else:
            table = np.load(stored.order, allow_pickle=False)
            position = table[min(head, len(table) - 1)].argsort()
        video = slice(self.text_before, self.text_before + math.prod(self.grid))
        block = position[token] // stored.block_q
        keys = mask[min(head, len(mask) - 1), block][position[video] // stored.block_k]
        return keys.reshape(self.grid), (position[video] // stored.block_q == block).reshape(self.grid)


def look_inside(pipe: DiffusionPipeline, request: Request, recipe: Recipe, folder: Path) -> Inside:
    """Generates once more with a recipe and puts down what every sparse call computes.

    Apart from the timed run, as looking costs time. Whole calls, as a search or a cache needs them, count as dense.

    Args:
        pipe: a pipeline that is not sparse at the moment, not compiled.
        request: what to generate.
        recipe: with what.
        folder: an empty folder for the masks.

    Raises:
        ValueError: as `sparse_dit.eval.pair.compare`.
    """
    arguments = plan_arguments(pipe, request)
    plan = explain(pipe, recipe, **arguments)
    steps = int(call_arguments(pipe, request)["num_inference_steps"])
    found = Inside(folder, plan.grid, plan.text_before, steps)
    keeper = _Keeper(found)
    if isinstance(recipe.order, Clusters):
        found.missing = "clusters change with the content of every call, so that blocks have no place in the frame"
    with sparse(pipe, recipe), probed(pipe, rows=ROWS) as probe:
        found.layers = probe.layers
        probe.calls = _Calls(keeper.keep)
        with keeper:
            generate(pipe, request)
    found.density, found.mass = probe.by_step("density", steps), probe.by_step("recall", steps)
    return found


class _Calls(dict[Place, list[Kept]]):
    """The calls of a probe, which says of every one where it was made when it is put down."""

    def __init__(self, seen: Callable[[Place, int], None]) -> None:
        super().__init__()
        self.seen = seen

    def __setitem__(self, place: Place, kept: list[Kept]) -> None:
        super().__setitem__(place, kept)
        self.seen(place, len(kept))


class _Keeper(TorchDispatchMode):
    """Sees the block lists of attention calls and keeps them once it is known where they were made."""

    def __init__(self, found: Inside) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found
        self.calls: list[tuple[Any, ...]] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if func in OPERATORS:
            self.calls.append(args[:8])
        return returned

    def keep(self, place: Place, calls: int) -> None:
        """Puts down the first of the last `calls` calls, which are those of a layer, and forgets all."""
        q, k, _, indices, counts, order, block_q, block_k = self.calls[-calls]
        self.calls.clear()
        found = self.found
        found.heads = found.heads or int(q.shape[1])
        if place.branch or found.missing.startswith("clusters"):
            return
        if q.shape[1] != found.heads:
            found.missing = "layers that leave whole heads out have no mask"
            return
        key_blocks = -(-k.shape[2] // block_k)
        mask = lists_to_mask(BlockList(indices[:1], counts[:1], block_q, block_k, key_blocks), key_blocks)[0]
        mask_file = self._file(np.packbits(mask.cpu().numpy(), axis=-1))
        order_file = None if order is None else self._file(order.cpu().numpy().astype(np.int32))
        if self.bytes > MASK_BYTES:
            found.missing = f"only the first {MASK_BYTES >> 20} MiB of masks are kept"
            return
        found.masks[place.step, place.layer] = Stored(mask_file, order_file, key_blocks, block_q, block_k)

    def _file(self, values: npt.NDArray[Any]) -> Path:
        """A file of these values; equal ones share it, as static masks do over all layers and steps."""
        digest = hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()[:32]
        file = self.found.folder / f"{digest}.npy"
        if not file.exists():
            self.bytes += values.nbytes
            if self.bytes <= MASK_BYTES:
                np.save(file, values, allow_pickle=False)
        return file
