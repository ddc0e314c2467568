"""Inputs and tolerances of the kernel tests."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import driver

from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.kernels.oracle import oracle_attention, oracle_summary_attention
from sparse_dit.kernels.oracle_blocks import oracle_block_means


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


def _summary_tolerances(q: Tensor, k: Tensor, v: Tensor, scale: float, mean_k: Tensor) -> tuple[float, float]:
    """How far out and lse with summaries may lie from the oracle; u is the unit roundoff of the dtype, w = 2^-24.

    To what `_tolerances` derives for attention along lists, summaries add:
    - means are rounded to the dtype: a score moves by u of |scale q| |mean k|, and mean v by u of its size. The sums
      of fp32 that make the means err by less than 4 sqrt(n) w of the tokens they sum, and w scale |q| |k| in a score.
    - out is rounded once before the merge, and once after: u. Weights of the merge err by 4 w and by w of |lse|.
    """
    u, w = torch.finfo(q.dtype).eps / 2, 2.0**-24
    # Bounds on |score|: of q with keys, and of q with the means of keys, which are no longer than keys are.
    longest = float(q.float().norm(dim=-1).max())
    size, rounded = (scale * longest * float(x.float().norm(dim=-1).max()) for x in (k, mean_k))
    score = (8 * math.sqrt(q.shape[-1]) * w + 2 * w) * size + u * rounded
    exponential = 4 * w if q.dtype is torch.float32 else 2.0**-14
    weight = score + exponential + 4 * math.sqrt(k.shape[2]) * w
    merge = 4 * w + 4 * w * (size + math.log(k.shape[2]))
    return (4 * u + 2 * weight + merge) * float(v.float().abs().max()), weight + merge


@pytest.fixture
def summary_tolerances() -> Callable[..., tuple[float, float]]:
    """The bounds on out and lse with summaries, of q, k, v, scale and the block means of k."""
    return _summary_tolerances


@pytest.fixture
def check_summary() -> Callable[..., None]:
    """Runs a backend with summaries, in native precision, and compares out and lse with the oracle."""

    def compare(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        block_q: int,
        block_k: int,
        backend: str | None,
        scale: float | None = None,
        order: Tensor | None = None,
    ) -> None:
        lists = mask_to_lists(mask, block_q, block_k)
        out, lse = block_sparse_attention(q, k, v, lists, scale=scale, order=order, skipped="summary", backend=backend)
        assert out.dtype is q.dtype
        assert lse.dtype is torch.float32
        assert out.transpose(1, 2).is_contiguous()
        if order is not None:
            q, k, v, out, lse = (gather_tokens(x, order) for x in (q, k, v, out, lse))
        expected_out, expected_lse = oracle_summary_attention(q, k, v, mask, block_q, block_k, scale)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        tolerance_out, tolerance_lse = _summary_tolerances(q, k, v, scale, oracle_block_means(k, block_k))
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


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors say that they lie on a GPU, and memory is not poisoned: that would be an operator."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: -1)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_stream=lambda device: "stream"))
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
