"""LPIPS, where its network is on disk. Nothing is ever downloaded."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TRUNK = "alexnet-owt-7be5be79.pth"
"""torchvision's AlexNet, the usual trunk of LPIPS; its name ends in the first digits of its SHA-256."""

_LEAST_SIDE = 32  # pixels; the trunk's pooling leaves nothing of smaller frames


def missing() -> str | None:
    """Why LPIPS cannot be measured here, in one line; None where it can."""
    if find_spec("torchvision") is None:
        return "lpips is not measured: torchvision is not installed"
    if not _trunk().is_file():
        return f"lpips is not measured: there is no {_trunk()}"
    if not _is_whole(_trunk()):
        return f"lpips is not measured: {_trunk()} is damaged, its checksum differs from its name"
    return None


def lpips(frames: Tensor, reference: Tensor) -> Tensor:
    """Learned perceptual distance of each frame (Zhang et al. 2018), with AlexNet; 0 for equal frames.

    Args:
        frames: [F, 3, H, W] in 0..1, height and width at least 32.
        reference: the same shape.

    Returns:
        fp64 [F].

    Raises:
        ValueError: `missing` gives a reason, or frames of another kind.
    """
    reason = missing()
    if reason is not None:
        raise ValueError(reason)
    if frames.shape[1] != 3 or min(frames.shape[2:]) < _LEAST_SIDE:
        raise ValueError(
            f"frames: shape {list(frames.shape)}; valid: 3 channels of at least {_LEAST_SIDE}x{_LEAST_SIDE} for lpips"
        )
    network = _network(frames.device)
    with torch.no_grad():
        pairs = zip(frames.float().split(1), reference.float().split(1), strict=True)
        return torch.cat([network(*pair).reshape(1) for pair in pairs]).double()


def _trunk() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / TRUNK


@lru_cache(maxsize=4)
def _is_whole(file: Path) -> bool:
    return hashlib.sha256(file.read_bytes()).hexdigest().startswith(file.stem.rpartition("-")[2])


@lru_cache(maxsize=1)
def _network(device: torch.device) -> Any:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)
