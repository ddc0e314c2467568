"""Triton: the means that `quantize` takes from keys and values, of at most SAMPLE rows a head.

Names as in `attention`.
"""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined, no-untyped-call"

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_dit.kernels.launches import launch_kernel, power_of_2
from sparse_dit.kernels.pieces import steps
from sparse_dit.kernels.quantize import ROTATED, SAMPLE, rotation

WARPS = 16
READ = 2**13  # elements of a step; steps are unrolled, so that loads of many are under way


@triton.jit
def load_signs(p_signs, PART: tl.constexpr):
    """[PART, PART], contiguous."""
    o_part = tl.arange(0, PART)
    return tl.load(p_signs + o_part[:, None] * PART + o_part[None, :])


@triton.jit
def _sampled_mean(p_x, x_token, x_dim, o_dim, m_dim, seq, STEP: tl.constexpr, SAMPLE: tl.constexpr):
    taken = tl.minimum(seq, SAMPLE)
    whole, rest = tl.maximum(seq, SAMPLE) // SAMPLE, tl.maximum(seq, SAMPLE) % SAMPLE
    b_sum = tl.zeros([STEP, o_dim.shape[0]], tl.float32)
    for first in tl.static_range(0, SAMPLE, STEP):
        o_sample = first + tl.arange(0, STEP)
        # i seq // taken, by divisions by a power of two alone: others take longer than to read the rows.
        o_token = (o_sample * whole + o_sample * rest // SAMPLE).to(tl.int64)
        m_x = (o_sample < taken)[:, None] & m_dim[None, :]
        b_sum += tl.load(p_x + o_token[:, None] * x_token + o_dim[None, :] * x_dim, mask=m_x, other=0.0).to(tl.float32)
    b_sum = tl.sum(b_sum, 0)
    return tl.div_rn(b_sum, tl.zeros_like(b_sum) + taken)


@triton.jit
def sampled_means_kernel(
    p_k,
    p_v,
    p_signs,
    p_norms,
    p_k_mean,
    p_v_mean,
    k_batch,
    k_head,
    k_token,
    k_dim,
    v_batch,
    v_head,
    v_token,
    v_dim,
    seq,
    FP8: tl.constexpr,
    ROTATE: tl.constexpr,
    PIECE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    PART: tl.constexpr,
    NORM: tl.constexpr,
    STEP: tl.constexpr,
    SAMPLE: tl.constexpr,
    LEADS: tl.constexpr,
):
    """Means over at most SAMPLE tokens at equal distances: of k, rotated, in programs (h, b, 0), of v in (h, b, 1).

    NORM is the factor of all rotated columns, or 0: they have factors of their own. LEADS: the kernel behind it may
    start at once, and waits for the means by itself.
    """
    if LEADS:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1
        )
    k_token, v_token = tl.cast(k_token, tl.int64) * PIECE, tl.cast(v_token, tl.int64) * PIECE
    i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_dim = tl.arange(0, PADDED)
    m_dim = o_dim < HEAD_SIZE
    o_mean = (i_b * tl.num_programs(0) + i_h) * HEAD_SIZE + o_dim
    if tl.program_id(2) == 0:
        p_k += (i_b * k_batch + i_h * k_head) * PIECE
        if ROTATE:
            b_signs = load_signs(p_signs, PART)  # under way together with the rows
        b_mean = _sampled_mean(p_k, k_token, k_dim, o_dim, m_dim, seq, STEP, SAMPLE)
        if ROTATE:
            b_parts = tl.reshape(b_mean, [PADDED // PART, PART])[:, :, None] * b_signs.to(tl.float32)[None]
            b_parts = tl.sum(b_parts, 1)
            b_parts = b_parts * NORM if NORM > 0 else b_parts * tl.load(p_norms + tl.arange(0, PART))[None, :]
            b_mean = tl.reshape(b_parts, [PADDED])
        tl.store(p_k_mean + o_mean, b_mean, mask=m_dim)
    elif FP8:
        p_v += (i_b * v_batch + i_h * v_head) * PIECE
        b_mean = _sampled_mean(p_v, v_token, v_dim, o_dim, m_dim, seq, STEP, SAMPLE)
        tl.store(p_v_mean + o_mean, b_mean, mask=m_dim)


@lru_cache
def constants(fp8: bool, head_size: int, rotate: bool, piece: int, norm: float, leads: bool = False) -> dict[str, Any]:
    """The compile-time arguments of `sampled_means_kernel`, not to be changed."""
    width = power_of_2(head_size)
    return {
        "FP8": fp8,
        "ROTATE": rotate,
        "PIECE": piece,
        "HEAD_SIZE": head_size,
        "PADDED": width,
        "PART": min(width, ROTATED),
        "NORM": norm,
        "STEP": min(READ // width, SAMPLE),
        "SAMPLE": SAMPLE,
        "LEADS": leads,
    }


@lru_cache
def rotation_factors(head_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rotation of the first min(D, ROTATED) channels: signs [PART, PART] and fp32 factors [PART], zero behind D."""
    width = min(power_of_2(head_size), ROTATED)
    matrix = torch.zeros(width, width)
    size = min(head_size, ROTATED)
    matrix[:size, :size] = rotation(size)
    return matrix.sign().to(device, dtype), matrix.abs().amax(dim=0).to(device)


def launch_means(
    k: Tensor,
    v: Tensor,
    v_mean: Tensor | None,
    factors: tuple[Tensor | None, Tensor | None],
    norm: float,
    leads: bool = False,
) -> Tensor:
    """Returns the sampled mean of k, fp32 [B, H, D], on its way, and that of v in `v_mean` where it is given.

    Args:
        k: [B, H, S, D], any strides.
        v: like k.
        v_mean: fp32 [B, H, D].
        factors: `rotation_factors`, or two of None: no rotation.
        norm: the one factor of all rotated columns, or 0: each has its own.
        leads: whether the kernel launched next may start at once; it waits for the means by itself.
    """
    batch, heads, seq, head_size = k.shape
    piece, strides = steps(k, v)
    k_mean = k.new_empty((batch, heads, head_size), dtype=torch.float32)
    fp8 = v_mean is not None
    fixed = constants(fp8, head_size, factors[0] is not None, piece, norm, leads)
    launch_kernel(
        sampled_means_kernel, (heads, batch, 1 + fp8),
        k, v, *factors, k_mean, v_mean, *strides, seq,
        **fixed, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return k_mean
