"""q, k and v in 8 bits for block-sparse attention, in block order."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sparse_dit.kernels.gather import gather_tokens

LOG2_E = math.log2(math.e)
LOW_PRECISIONS = ("int8", "int8_fp8")
GROUP = 128  # keys, and values, that share a scale; their codes are padded to whole groups
CODE_ALIGN = 32  # channels of q and k are padded to a multiple: the least an INT8 matrix instruction takes
SAMPLE = 256  # tokens that the subtracted means are taken over
INT8_MAX = 127.0
FP8_MAX = 448.0
SMALLEST = 2.0**-100  # stands in for an absolute maximum of zero


@dataclass(frozen=True, eq=False)
class Quantized:
    """q, k and v as the low-precision kernels read them: in block order, contiguous.

    With c the vector subtracted from all keys and R the rotation of channels, both exact in real arithmetic,

        q_scale[i] k_scale[j // GROUP] (q[i] . k[j]) ~ scale log2(e) q_i . (k_j - c)
        lse_i = ln 2 log2 sum_j 2^(the above) + lse_shift[i],  lse_shift[i] = scale q_i . c.

    Attributes:
        q: int8 [B, H, Sq, C], rotated; C is D rounded up to CODE_ALIGN, zeros behind D.
        q_scale: fp32 [B, H, Sq], scale log2(e) and the step of the codes.
        lse_shift: fp32 [B, H, Sq], natural log.
        k: int8 [B, H, P, C], smoothed and rotated; P is Sk rounded up to GROUP, zeros behind Sk.
        k_scale: fp32 [B, H, P / GROUP].
        v: "int8": [B, H, Sk, D] in the caller's dtype (and the caller's memory, where there is no order to gather by).
            "int8_fp8": float8_e4m3fn [B, H, D, P], v_mean subtracted, zeros behind Sk.
        v_scale: "int8_fp8": fp32 [B, H, P / GROUP], v_jd ~ v_scale[j // GROUP] v[d, j] + v_mean[d].
        v_mean: "int8_fp8": fp32 [B, H, D].
        seq_k: Sk.
        head_size: D.
    """

    q: Tensor
    q_scale: Tensor
    lse_shift: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor | None
    v_mean: Tensor | None
    seq_k: int
    head_size: int

    def dequantized(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the codes stand for, fp32: q [B, H, Sq, D], k and v [B, H, Sk, D]; weights are softmax(ln 2 q.k)."""
        q = (self.q.float() * self.q_scale[..., None])[..., : self.head_size]
        k_scale = self.k_scale.repeat_interleave(GROUP, dim=-1)
        k = (self.k.float() * k_scale[..., None])[:, :, : self.seq_k, : self.head_size]
        if self.v_scale is None or self.v_mean is None:
            return q, k, self.v.float()
        v = self.v.float() * self.v_scale.repeat_interleave(GROUP, dim=-1)[:, :, None]
        return q, k, rearrange(v, "b h d s -> b h s d")[:, :, : self.seq_k] + self.v_mean[:, :, None]


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    precision: str,
    scale: float,
    order: Tensor | None = None,
    rotate: bool = True,
) -> Quantized:
    """Orders, smooths, rotates and quantizes, each of q, k and v in one pass.

    Args:
        q: queries [B, H, Sq, D], any strides.
        k: keys [B, H, Sk, D], like q.
        v: values [B, H, Sk, D], like q.
        precision: "int8" or "int8_fp8".
        scale: factor on the scores.
        order: int64 [1 or H, S], token ids in the order in which they enter blocks; None: as they stand.
        rotate: whether q and k are multiplied by a Hadamard matrix over channels.

    Raises:
        ValueError: precision is neither.
    """
    if precision not in LOW_PRECISIONS:
        raise ValueError(f"precision: {precision!r}; valid: one of {LOW_PRECISIONS}")
    return _torch_quantize(q, k, v, precision, scale, order, rotate)


def _torch_quantize(
    q: Tensor, k: Tensor, v: Tensor, precision: str, scale: float, order: Tensor | None, rotate: bool
) -> Quantized:
    seq_k = k.shape[2]
    k_mean, v_mean = (sampled_mean(x) for x in (k, v))
    if order is not None:
        q, k, v = (gather_tokens(x, order) for x in (q, k, v))
    wide_q, wide_k = q.float(), k.float()
    if rotate:
        matrix = rotation(q.shape[-1]).to(q.device)
        wide_q, wide_k, k_mean = wide_q @ matrix, wide_k @ matrix, k_mean @ matrix
    lse_shift = torch.einsum("bhsd,bhd->bhs", wide_q, k_mean) * scale
    q_codes, q_step = _codes(rearrange(wide_q, "b h s d -> b h s 1 d"))
    centred = F.pad(wide_k - k_mean[:, :, None], (0, 0, 0, -seq_k % GROUP))
    k_codes, k_step = _codes(rearrange(centred, "b h (g n) d -> b h g n d", n=GROUP))
    v_codes, v_scale = v, None
    if precision == "int8_fp8":
        v_codes, v_scale = _fp8_codes(v, v_mean)
    padded = (0, -q.shape[-1] % CODE_ALIGN)
    return Quantized(
        q=F.pad(rearrange(q_codes, "b h s 1 d -> b h s d"), padded),
        q_scale=q_step * (scale * LOG2_E),
        lse_shift=lse_shift,
        k=F.pad(rearrange(k_codes, "b h g n d -> b h (g n) d"), padded),
        k_scale=k_step,
        v=v_codes,
        v_scale=v_scale,
        v_mean=None if v_scale is None else v_mean,
        seq_k=seq_k,
        head_size=q.shape[-1],
    )


def sampled_mean(x: Tensor) -> Tensor:
    """Mean over at most SAMPLE tokens at equal distances, fp32: [B, H, S, D] -> [B, H, D].

    Softmax does not see what is subtracted from all keys alike, so any vector is exact; one near the mean is good.
    """
    seq = x.shape[2]
    taken = min(seq, SAMPLE)
    return x[:, :, torch.arange(taken, device=x.device) * seq // taken].float().mean(dim=2)


def _codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric INT8 codes of x [..., tokens, D], one step for the last two dimensions."""
    top = x.abs().amax(dim=(-2, -1)).clamp_min(SMALLEST)
    codes = (x * (INT8_MAX / top)[..., None, None]).round().to(torch.int8)
    return codes, top / INT8_MAX


def _fp8_codes(v: Tensor, v_mean: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of v - v_mean as [B, H, D, P], one scale for GROUP tokens."""
    centred = F.pad(v.float() - v_mean[:, :, None], (0, 0, 0, -v.shape[2] % GROUP))
    groups = rearrange(centred, "b h (g n) d -> b h g n d", n=GROUP)
    top = groups.abs().amax(dim=(-2, -1)).clamp_min(SMALLEST)
    codes = (groups * (FP8_MAX / top)[..., None, None]).to(torch.float8_e4m3fn)
    return rearrange(codes, "b h g n d -> b h d (g n)").contiguous(), top / FP8_MAX


@lru_cache
def rotation(head_size: int) -> Tensor:
    """Orthogonal fp32 [D, D]: Hadamard matrices along the diagonal, one for each power of two in D (72 = 64 + 8)."""
    blocks = [1 << bit for bit in range(head_size.bit_length() - 1, -1, -1) if head_size >> bit & 1]
    matrix: Tensor = torch.block_diag(*(_hadamard(size) / math.sqrt(size) for size in blocks))
    return matrix


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix
