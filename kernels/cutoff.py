"""The largest of a pool of numbers, up to a sum of them: gates of a head, of a row, of a whole call."""

import torch
import torch.nn.functional as F
from torch import Tensor


def take_mass(gates: Tensor, own: Tensor, threshold: float) -> Tensor:
    """Takes the largest gates of each pool until they sum to a share of the pool's sum (VMoBA, arXiv 2506.23858).

    Gates are brought to [0, 1] by the smallest and the largest of their pool; where those are equal, each is 1. Own
    gates are taken first and count; then come the others in falling order, equal ones as they stand, as long as those
    before sum to less than `threshold` of all.

    Args:
        gates: finite fp32 [pools, rows, columns].
        own: bool [pools or 1, rows, columns], gates that are always taken.
        threshold: share of the pool's sum, in (0, 1].

    Returns:
        bool [pools, rows, columns].

    Raises:
        ValueError: a shape or dtype is not as above, or the threshold is no share.
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold: {threshold!r}; valid: a share in (0, 1]")
    fits = own.dtype is torch.bool and own.ndim == 3 and own.shape[0] in (1, len(gates))
    if gates.dtype is not torch.float32 or gates.ndim != 3 or 0 in gates.shape:
        raise ValueError(f"gates: {gates.dtype} {list(gates.shape)}; valid: torch.float32 [pools, rows, columns]")
    if not fits or own.shape[1:] != gates.shape[1:] or own.device != gates.device:
        raise ValueError(
            f"own: {own.dtype} {list(own.shape)} on {own.device}; valid: torch.bool [{len(gates)} or 1, "
            f"{gates.shape[1]}, {gates.shape[2]}] on {gates.device}"
        )
    if gates.is_cuda:
        from sparse_dit.kernels.cutoff_triton import triton_take_mass

        return triton_take_mass(gates, own, threshold)
    return torch_take_mass(gates, own, threshold)


def torch_take_mass(gates: Tensor, own: Tensor, threshold: float) -> Tensor:
    """The contract of `take_mass`; arguments already checked."""
    flat, always = gates.flatten(1), own.expand(gates.shape).flatten(1)
    low, high = flat.amin(dim=-1, keepdim=True), flat.amax(dim=-1, keepdim=True)
    share = torch.where(high > low, (flat - low) / (high - low), 1.0)
    order = share.masked_fill(always, torch.inf).sort(dim=-1, descending=True, stable=True).indices
    total = share.double().gather(-1, order).cumsum(dim=-1)
    before = F.pad(total[..., :-1], (1, 0))
    taken = torch.zeros_like(always).scatter_(-1, order, before < threshold * total[..., -1:]) | always
    return taken.view(gates.shape)
