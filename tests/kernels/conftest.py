"""Inputs and tolerances of the kernel tests."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.kernels.oracle import oracle_attention


def _tolerances(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[float, float]:
    """How far out and lse may lie from the float64 oracle on the same, already rounded, inputs.

    u is the unit roundoff of the dtype, w = 2^-24 that of fp32. Errors of n independent roundings grow like sqrt(n)
    (Higham and Mary 2019, theorem 2.4); 4 sqrt(n) holds but for one case in thousands.

    - A score is a sum of D products of total size at most S = scale |q| |k| (Cauchy): error 4 sqrt(D) w S, plus w S for
      scaling and for subtracting the maximum. A weight exp(score) inherits it as a relative error.
    - exp itself: 4 w, but 2^-14 in torch's fused CPU kernel on 16-bit inputs, which takes a fast exponential.
    - The sum of n weights: 4 sqrt(n) w.
    - Weights are rounded to the dtype before they meet V, and so is the output: u each.

    Everything but the last moves lse, too; all of it moves out, at most by max |v|. Weights appear above and below the
    fraction: twice.
    """
    u = torch.finfo(q.dtype).eps / 2
    w = 2.0**-24
    size = scale * float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max())
    score = (4 * math.sqrt(q.shape[-1]) * w + 2 * w) * size
    exponential = 4 * w if q.dtype is torch.float32 else 2.0**-14
    sum_of_weights = 4 * math.sqrt(k.shape[-2]) * w
    weight = score + exponential + sum_of_weights
    return (2 * u + 2 * weight) * float(v.float().abs().max()), weight + w * (size + math.log(k.shape[-2]))


@pytest.fixture
def check() -> Callable[..., None]:
    """Runs a backend on the listed blocks of a mask and compares out and lse with the oracle."""

    def compare(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        block_q: int,
        block_k: int,
        backend: str | None,
        scale: float | None = None,
    ) -> None:
        out, lse = block_sparse_attention(q, k, v, mask_to_lists(mask, block_q, block_k), scale=scale, backend=backend)
        expected_out, expected_lse = oracle_attention(q, k, v, mask, block_q, block_k, scale)
        assert out.dtype is q.dtype
        assert lse.dtype is torch.float32
        tolerance_out, tolerance_lse = _tolerances(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
        torch.testing.assert_close(out.double(), expected_out, atol=tolerance_out, rtol=0)
        torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance_lse, rtol=0)

    return compare


@pytest.fixture
def qkv() -> Callable[..., list[Tensor]]:
    """Makes q, k, v [B, H, S, D] as models do: views of memory laid out as [B, S, H, D]."""

    def make(
        batch: int,
        heads: int,
        seq: int,
        head_size: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seq_k: int | None = None,
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seq * head_size + batch)
        return [
            torch.randn(batch, length, heads, head_size, generator=generator).to(device, dtype).transpose(1, 2)
            for length in (seq, seq_k or seq, seq_k or seq)
        ]

    return make


@pytest.fixture
def exact_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Triton's interpreter round to E4M3 as GPUs and torch do: its own cast drops the carry out of a mantissa."""
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if target != language.float8e4nv or source not in (language.float32, language.float16):
            return convert(data, source, target, mode)
        wide = torch.from_numpy(data.view(np.float32 if source == language.float32 else np.float16).copy())
        return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def random_mask() -> Callable[..., Tensor]:
    """Makes a bool mask [B, H, QB, KB] of about the given density; every row keeps at least one key block."""

    def make(batch: int, heads: int, q_blocks: int, k_blocks: int, density: float = 0.4, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        score = torch.rand(batch, heads, q_blocks, k_blocks, generator=generator)
        return (score < density) | (score == score.amin(dim=-1, keepdim=True))

    return make
