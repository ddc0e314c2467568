"""What becomes of the blocks that were not selected."""

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch

from sparse_dit.layout import TokenLayout


@dataclass(frozen=True)
class Drop:
    """They are left out of the softmax."""

    def __str__(self) -> str:
        return "drop"


@dataclass(frozen=True)
class Summarize:
    """Each enters the same softmax as one key, its mean K and mean V, with the weight of its count of tokens.

    So does Sol-Attn (arXiv 2607.24027) with blocks below its cutoff. Nothing is kept between steps. A row computes one
    key more for each skipped block, at most 1 / block_k of the keys there are.
    """

    def __str__(self) -> str:
        return "summary"


@dataclass(frozen=True)
class Reuse:
    """They keep what they added at the last refresh: Re-ttention (arXiv 2505.22918, NeurIPS 2025).

    A refresh computes the whole output O and the sparse output W with their log-sum-exps and keeps, for each query, the
    softmax ratio rho = exp(lse_sparse - lse_whole), the share that the selected blocks have in the denominator, and the
    residual R = O - rho W, which is what the others add. It returns O. Between refreshes the output is
    (rho + n ramp) W + R, n the sparse steps since the one that followed the refresh.

    The paper keeps R behind the output projection; as that is linear, the sum is the same. Without `ratio` this is the
    residual of DiTFastAttn (arXiv 2406.08552): R = O - W, and W + R.

    Args:
        ratio: whether the sparse output is scaled by rho.
        ramp: what is added to rho for every further step (lambda in the paper).

    Raises:
        ValueError: ramp is negative.
    """

    ratio: bool = True
    ramp: float = 0.04

    def __post_init__(self) -> None:
        if not 0.0 <= self.ramp < float("inf"):
            raise ValueError(f"skipped.ramp: {self.ramp!r}; valid: 0 or a positive number")

    def __str__(self) -> str:
        return f"reuse ramp {self.ramp}" if self.ratio else "reuse without ratio"

    def keep(
        self,
        slot: MutableMapping[str, torch.Tensor],
        whole: tuple[torch.Tensor, torch.Tensor],
        part: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Put residual and ratio into a layer's slot.

        Args:
            slot: gets `residual` [B, H, S, D] in the dtype of the outputs and, with `ratio`, `ratio` fp32 [B, H, S].
            whole: output [B, H, S, D] and log-sum-exp fp32 [B, H, S] of the whole call.
            part: the same of the sparse call.
        """
        sparse = part[0]
        if self.ratio:
            slot["ratio"] = (part[1] - whole[1]).exp()
            sparse = slot["ratio"][..., None] * sparse
        slot["residual"] = (whole[0] - sparse).to(whole[0].dtype)

    def add(self, out: torch.Tensor, slot: MutableMapping[str, torch.Tensor], steps: int) -> torch.Tensor:
        """The sparse output with what the other blocks added at the refresh.

        Args:
            out: sparse output [B, H, S, D].
            slot: as `keep` left it.
            steps: steps since the refresh, at least 1.
        """
        if not self.ratio:
            return out + slot["residual"]
        ratio = (slot["ratio"] + self.ramp * (steps - 1))[..., None]
        return (ratio * out + slot["residual"]).to(out.dtype)

    def kept_bytes(self, layout: TokenLayout, *, batch: int, heads: int, head_size: int, itemsize: int) -> int:
        """Bytes that one layer keeps for one branch, whose outputs are [batch, heads, S, head_size] of `itemsize`."""
        return batch * heads * layout.length * (head_size * itemsize + 4 * self.ratio)


Skipped = Drop | Summarize | Reuse

SKIPPED: dict[str, type[Drop] | type[Summarize] | type[Reuse]] = {
    "drop": Drop,
    "summary": Summarize,
    "reuse": Reuse,
}
