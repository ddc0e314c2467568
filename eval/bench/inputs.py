"""Random inputs and block lists of a shape, and what attention gives for them exactly."""

import math
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from sparse_dit.eval.bench.cases import BLOCK_Q, GRIDS, TILE, Case, Shape
from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.lists import lists_to_mask, mask_to_lists
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Tiles

QUERIES = 256  # rows computed exactly, spread over all heads
TEXT_BLOCKS = 4  # query blocks at the end of uneven lists that compute all keys, as those of text do


class Inputs:
    """q, k, v ~ N(0, 1) of a shape, and the block lists of cases.

    Args:
        shape: of the attention.
        device: where all of it lies.
        dtype: of q, k and v.
        sets: how many sets of q, k and v.
        seed: of everything random.

    Attributes:
        sets: triples q, k, v [1, H, S, D].
        rows: int64 [H, n], the queries of each head that are computed exactly.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, sets: int, seed: int) -> None:
        self.shape = shape
        self.device = device
        self._random = torch.Generator(device).manual_seed(seed)
        size = (1, shape.heads, shape.tokens, shape.head_size)
        self.sets = [self._triple(size, dtype) for _ in range(sets)]
        count = min(shape.tokens, math.ceil(QUERIES / shape.heads))
        draw = torch.rand(shape.heads, shape.tokens, generator=self._random, device=device)
        self.rows = draw.topk(count, dim=-1).indices
        self._lists: dict[tuple[str, float, int], BlockList] = {}
        self._exact: dict[tuple[str, float, int, bool, str], Tensor] = {}

    def _triple(self, size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (torch.randn(size, generator=self._random, device=self.device, dtype=dtype) for _ in range(3))
        return q, k, v

    def blocks(self, case: Case) -> BlockList:
        """The lists of a case, [1, H, QB, KB], the same for all cases that ask for the same ones."""
        key = (case.lists, case.density, case.block_k)
        if key not in self._lists:
            self._lists[key] = self._random_lists(case)
        return self._lists[key]

    def _random_lists(self, case: Case) -> BlockList:
        query_blocks, key_blocks = (math.ceil(self.shape.tokens / block) for block in (BLOCK_Q, case.block_k))
        size = (1, self.shape.heads, query_blocks, key_blocks)
        if case.lists == "equal":
            counts = torch.full(size[:3], max(1, round(case.density * key_blocks)), device=self.device)
        elif case.lists == "uneven":
            counts = torch.randint(1, key_blocks + 1, size[:3], generator=self._random, device=self.device)
            counts[..., -TEXT_BLOCKS:] = key_blocks
        else:
            uneven = self.blocks(Case("attention", case.kernel, case.density, lists="uneven", block_k=case.block_k))
            counts = uneven.counts.double().mean().round().long().expand(size[:3])
        place = torch.rand(size, generator=self._random, device=self.device).argsort(dim=-1).argsort(dim=-1)
        return mask_to_lists(place < counts[..., None], BLOCK_Q, case.block_k)

    @cached_property
    def order(self) -> Tensor:
        """int64 [1, S], the tokens in the order of tiles of the grid."""
        table = Tiles(TILE).table(TokenLayout(GRIDS[self.shape.tokens]), self.shape.heads)
        assert table is not None
        return table.to(self.device)

    def error(self, case: Case, out: Tensor) -> float:
        """Relative L2 error of out [1, H, S, D] of the first set against float64, over `rows`.

        With an order, rows are counted in it: they lie anywhere in the grid.
        """
        key = (case.lists, case.density, case.block_k, case.ordered, case.skipped)
        if key not in self._exact:
            self._exact[key] = self._exact_rows(case)
        exact = self._exact[key]
        if case.ordered:
            out = gather_tokens(out, self.order)
        computed = out[0, torch.arange(self.shape.heads, device=self.device)[:, None], self.rows].double()
        return float((computed - exact).norm() / exact.norm())

    def _exact_rows(self, case: Case) -> Tensor:
        """float64 [H, n, D], one head at a time."""
        blocks = self.blocks(case)
        mask = lists_to_mask(blocks, math.ceil(self.shape.tokens / case.block_k))[0]
        found = []
        for head, rows in enumerate(self.rows):
            q, k, v = (self._head(x, head, case.ordered) for x in self.sets[0])
            listed = mask[head, rows // BLOCK_Q]
            weights = listed.repeat_interleave(case.block_k, dim=-1)[:, : self.shape.tokens].double()
            if case.skipped == "summary":
                means = [torch.stack([part.mean(dim=0) for part in x.split(case.block_k)]) for x in (k, v)]
                k, v = (torch.cat(pair) for pair in zip((k, v), means, strict=True))
                tokens = torch.tensor([len(part) for part in weights[0].split(case.block_k)], device=self.device)
                weights = torch.cat((weights, ~listed * tokens), dim=-1)
            scores = (q[rows] @ rearrange(k, "s d -> d s")) * self.shape.head_size**-0.5
            found.append((scores + weights.log()).softmax(dim=-1) @ v)
        return torch.stack(found)

    def _head(self, x: Tensor, head: int, ordered: bool) -> Tensor:
        """float64 [S, D] of one head."""
        return (x[0, head][self.order[0]] if ordered else x[0, head]).double()

    def mass_error(self, block_k: int, mass: Tensor, lse: Tensor) -> float:
        """Relative L2 error of block mass [1, H, QB, KB] of the first set, over one query block a head."""
        q, k, _ = self.sets[0]
        wrong, whole = 0.0, 0.0
        for head, row in enumerate(self.rows[:, 0]):
            block = int(row) // BLOCK_Q
            span = slice(block * BLOCK_Q, (block + 1) * BLOCK_Q)
            scores = q[0, head, span].double() @ rearrange(k[0, head].double(), "s d -> d s")
            weights = (scores * self.shape.head_size**-0.5 - lse[0, head, span, None].double()).exp().mean(dim=0)
            padded = torch.nn.functional.pad(weights, (0, -self.shape.tokens % block_k))
            exact = rearrange(padded, "(n j) -> n j", j=block_k).sum(dim=-1)
            wrong += float((mass[0, head, block].double() - exact).square().sum())
            whole += float(exact.square().sum())
        return math.sqrt(wrong / whole)
