"""What becomes of the blocks that were not selected."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from sparse_dit.kernels.pool import block_means
from sparse_dit.layout import TokenLayout


@dataclass(frozen=True)
class Drop:
    """They are left out of the softmax."""

    summarizes: ClassVar[bool] = False

    def __str__(self) -> str:
        return "drop"


@dataclass(frozen=True)
class Summarize:
    """Each enters the same softmax as one key, its mean K and mean V, with the weight of its count of tokens.

    So does Sol-Attn (arXiv 2607.24027) with blocks below its cutoff. Nothing is kept between steps. A row computes one
    key more for each skipped block, at most 1 / block_k of the keys there are.
    """

    summarizes: ClassVar[bool] = True

    def __str__(self) -> str:
        return "summary"


class Parts(NamedTuple):
    """Runs of tokens that share what is kept.

    Attributes:
        table: int64 [1 or H, S], token ids in the order along which the runs lie; `None` when no token moves.
        of_token: int64 [1 or H, S], the run of each token id.
    """

    table: torch.Tensor | None
    of_token: torch.Tensor


@dataclass(frozen=True)
class Reuse:
    """They keep what they added at the last refresh: Re-ttention (arXiv 2505.22918, NeurIPS 2025).

    A refresh computes the whole output O and the sparse output W with their log-sum-exps and keeps, for each query, the
    softmax ratio rho = exp(lse_sparse - lse_whole), the share that the selected blocks have in the denominator, and the
    residual R = O - rho W, which is what the others add. It returns O. Between refreshes the output is
    (rho + n ramp) W + R, n the sparse steps since the one that followed the refresh.

    The paper keeps R behind the output projection; as that is linear, the sum is the same. Without `ratio` this is the
    residual of DiTFastAttn (arXiv 2406.08552): R = O - W, and W + R.

    Ours is that residual behind summaries: skipped blocks enter the softmax of W as their means, in every step, and R
    is what the means miss. The means follow what changes from step to step, so that less of R grows old.

    Args:
        ratio: whether the sparse output is scaled by rho.
        ramp: what is added to rho for every further step (lambda in the paper); with `ratio` only.
        summary: whether skipped blocks enter the softmax as with `Summarize`; without `ratio` only.
        part: so many tokens, one after the other in the recipe's order, keep the mean of their R instead of each its
            own, which is as many times less to keep; without `ratio` only.

    Raises:
        ValueError: a value is out of its range, or does not go with `ratio` as it is.
    """

    UNSAID: ClassVar[tuple[str, ...]] = ("summary", "part")

    ratio: bool = True
    ramp: float = 0.04
    summary: bool = False
    part: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.ramp < float("inf"):
            raise ValueError(f"skipped.ramp: {self.ramp!r}; valid: 0 or a positive number")
        if self.part < 1:
            raise ValueError(f"skipped.part: {self.part!r}; valid: 1 or more tokens")
        for name, default in (("summary", False), ("part", 1)):
            if self.ratio and getattr(self, name) != default:
                raise ValueError(f"skipped.{name}: {getattr(self, name)!r} with ratio; valid: ratio false")

        if not self.ratio and self.ramp != Reuse.ramp:
            raise ValueError(f"skipped.ramp: {self.ramp!r} without ratio; valid: ratio true")

    def __str__(self) -> str:
        if self.ratio:
            return f"reuse ramp {self.ramp}"
        return f"reuse without ratio{', with summaries' * self.summary}{f', parts of {self.part}' * (self.part > 1)}"

    @property
    def summarizes(self) -> bool:
        """Whether skipped blocks enter the softmax as their means."""
        return self.summary

    def keep(
        self,
        slot: MutableMapping[str, torch.Tensor],
        whole: tuple[torch.Tensor, torch.Tensor],
        sparsely: tuple[torch.Tensor, torch.Tensor],
        parts: Parts | None = None,
    ) -> None:
        """Put residual and ratio into a layer's slot.

        Args:
            slot: gets `residual` [B, H, ceil(S / part), D] in the dtype of the outputs and, with `ratio`, `ratio` fp32
                [B, H, S].
            whole: output [B, H, S, D] and log-sum-exp fp32 [B, H, S] of the whole call.
            sparsely: the same of the sparse call.
            parts: the runs of `part` tokens, where that is above 1.
        """
        sparse = sparsely[0]
        if self.ratio:
            slot["ratio"] = (sparsely[1] - whole[1]).exp()
            sparse = slot["ratio"][..., None] * sparse
        residual = whole[0] - sparse
        if parts is not None:
            means = block_means(residual, self.part, order=parts.table).to(whole[0].dtype)
            # Heads of a part side by side in memory, so that tokens find theirs in long pieces.
            residual = means.transpose(1, 2).contiguous().transpose(1, 2)
        slot["residual"] = residual.to(whole[0].dtype)

    def add(
        self, out: torch.Tensor, slot: MutableMapping[str, torch.Tensor], steps: int, parts: Parts | None = None
    ) -> torch.Tensor:
        """The sparse output with what the other blocks added at the refresh.

        Args:
            out: sparse output [B, H, S, D].
            slot: as `keep` left it.
            steps: steps since the refresh, at least 1.
            parts: as `keep` was told.
        """
        if parts is not None:
            return out + _of_tokens(slot["residual"], parts.of_token)
        if not self.ratio:
            return out + slot["residual"]
        ratio = (slot["ratio"] + self.ramp * (steps - 1))[..., None]
        return (ratio * out + slot["residual"]).to(out.dtype)

    def kept_bytes(self, layout: TokenLayout, *, batch: int, heads: int, head_size: int, itemsize: int) -> int:
        """Bytes that one layer keeps for one branch, whose outputs are [batch, heads, S, head_size] of `itemsize`."""
        return batch * heads * (-(-layout.length // self.part) * head_size * itemsize + layout.length * 4 * self.ratio)


def _of_tokens(kept: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """What parts keep [B, H, N, D], for each token of them [B, H, S, D]; part is int64 [1 or H, S]."""
    if len(part) == 1:
        return kept.transpose(1, 2).index_select(1, part[0]).transpose(1, 2)
    return kept.gather(2, part[None, :, :, None].expand(kept.shape[0], -1, -1, kept.shape[3]))


Skipped = Drop | Summarize | Reuse

SKIPPED: dict[str, type[Drop] | type[Summarize] | type[Reuse]] = {
    "drop": Drop,
    "summary": Summarize,
    "reuse": Reuse,
}
