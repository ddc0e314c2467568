"""q, k and v in 8 bits for block-sparse attention, in block order.

Keys are smoothed as in SageAttention (arXiv:2410.02367): softmax does not see a vector that is subtracted from all of
them, and the log-sum-exp gets its share back exactly. A mean over SAMPLE tokens does as well as the mean over all;
for k 256 would do. What is left of the mean of v adds up along a row, and FP8 units drop bits of large sums.

Relative L2 error of the output against fp32, S = 2,304, "int8", tokens that share a scale in q / in k:

    D    q, k ~ N(0, 1)          1/1     1/16    1/64    1/128   32/64   128/64
    128                          0.0095  0.0108  0.0114  0.0117  0.0128  0.0133
    128  norms of k differ       0.0160  0.0163  0.0169  0.0173  0.0198  0.0210
    128  4 channels of k x 20    0.0762  0.0802  0.0877  0.0923  0.0881  0.0887
    128  the same, rotated       0.0213  0.0218  0.0227  0.0233  0.0251  0.0265
    64                           0.0089  0.0102  0.0109  0.0112  0.0124  0.0129

So q has a scale a token, free in a kernel, and k one for GROUP = 128 tokens: any tile of keys then has a single scale,
and a scale a token would cost a load a column to win a fifth. Rotation costs no accuracy on normal inputs and takes
three quarters of the error off outlier channels: it is on.

"int8_fp8" adds the rounding of weights and v to E4M3, 0.026 each: 0.0386 (D = 128) and 0.0378 (D = 64) in all. How many
values share a scale does not matter (a channel, a channel and 128 tokens, 128 tokens: 0.0392, 0.0379, 0.0386; one
channel x 300: 0.0468, 0.0428, 0.0428): E4M3 has range to spare, so 128 tokens share one over all channels, found in the
pass that reads them. Subtracting a mean from v halves the error where v has one (0.0023 to 0.0012 for N(c, 1) with c
itself N(0, 1)). Summing weights rounded instead of in fp32 wins nothing (0.0385).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sparse_dit.kernels.backends import hopper_quantize_refusal, quantize_backend
from sparse_dit.kernels.gather import gather_tokens

LOG2_E = math.log2(math.e)
LOW_PRECISIONS = ("int8", "int8_fp8")
GROUP = 128  # keys, and values, that share a scale; their codes are padded to whole groups
CODE_ALIGN = 32  # channels of q and k are padded to a multiple: the least an INT8 matrix instruction takes
SAMPLE = 1024  # tokens that the subtracted means are taken over
INT8_MAX = 127.0
FP8_MAX = 448.0
ROTATED = 128  # channels that one Hadamard matrix mixes at most
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
            "int8_fp8": float8_e4m3fn [B, H, D, P], v_mean subtracted, zeros behind Sk. Of each 16 tokens, token
            8 i + 2 t + e lies at 4 t + 2 i + e (i and e in 0..1, t in 0..3): a matrix unit leaves thread t the scores
            of tokens 2 t + {0, 1, 8, 9}, and takes from it the FP8 weights of tokens 4 t + {0, 1, 2, 3}.
        v_scale: "int8_fp8": fp32 [B, H, P / GROUP], v_jd ~ v_scale[j // GROUP] v[d, place of j] + v_mean[d].
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
        v = rearrange(v, "b h d (g t i e) -> b h (g i t e) d", i=2, t=4, e=2)[:, :, : self.seq_k]
        return q, k, v + self.v_mean[:, :, None]


def fresh_codes(q: Tensor, k: Tensor, v: Tensor, precision: str, ordered: bool) -> Quantized:
    """Memory for the codes of q [B, H, Sq, D], k and v [B, H, Sk, D], with nothing in it yet but v where it stays."""
    batch, heads, seq_q, head_size = q.shape
    seq_k, width = k.shape[2], padded(head_size, CODE_ALIGN)
    padded_k = padded(seq_k, GROUP)
    fp8 = precision == "int8_fp8"

    def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return q.new_empty((batch, heads, *shape), dtype=dtype)

    codes = v
    if fp8:
        codes = fresh(head_size, padded_k, dtype=torch.float8_e4m3fn)
    elif ordered:
        codes = fresh(seq_k, head_size, dtype=v.dtype)
    return Quantized(
        q=fresh(seq_q, width, dtype=torch.int8),
        q_scale=fresh(seq_q),
        lse_shift=fresh(seq_q),
        k=fresh(padded_k, width, dtype=torch.int8),
        k_scale=fresh(padded_k // GROUP),
        v=codes,
        v_scale=fresh(padded_k // GROUP) if fp8 else None,
        v_mean=fresh(head_size) if fp8 else None,
        seq_k=seq_k,
        head_size=head_size,
    )


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    precision: str,
    scale: float,
    order: Tensor | None = None,
    rotate: bool = True,
    backend: str | None = None,
) -> Quantized:
    """Orders, smooths, rotates and quantizes, each of q, k and v in one pass.

    Args:
        q: queries [B, H, Sq, D], any strides.
        k: keys [B, H, Sk, D], like q.
        v: values [B, H, Sk, D], like q.
        precision: "int8" or "int8_fp8".
        scale: factor on the scores.
        order: int64 [1 or H, S], token ids in the order in which they enter blocks; None: as they stand.
        rotate: whether q and k are multiplied by Hadamard matrices over channels.
        backend: "hopper", "triton", "host", or None: the fastest that takes the tensors.

    Raises:
        ValueError: precision or backend is none of these, or the backend does not take the tensors.
    """
    order = None if order is None else order.contiguous()
    if precision not in LOW_PRECISIONS:
        raise ValueError(f"precision: {precision!r}; valid: one of {LOW_PRECISIONS}")
    if backend not in (None, "hopper", "triton", "host"):
        raise ValueError(f"backend: {backend!r}; valid: 'hopper', 'triton', 'host', or None to choose by device")
    if backend is None:
        backend = quantize_backend(q, k, v, rotate)
    elif backend == "hopper" and (reason := hopper_quantize_refusal(q, k, v, rotate)):
        raise ValueError(f"backend: 'hopper', but {reason}; valid: 'triton', or None to choose")
    if backend == "hopper":
        from sparse_dit.kernels.quantize_hopper import hopper_quantize

        return hopper_quantize(q, k, v, precision, scale, order)
    if backend == "triton":
        from sparse_dit.kernels.quantize_triton import triton_quantize

        return triton_quantize(q, k, v, precision, scale, order, rotate)
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
    padding = (0, -q.shape[-1] % CODE_ALIGN)
    return Quantized(
        q=F.pad(rearrange(q_codes, "b h s 1 d -> b h s d"), padding),
        q_scale=q_step * (scale * LOG2_E),
        lse_shift=lse_shift,
        k=F.pad(rearrange(k_codes, "b h g n d -> b h (g n) d"), padding),
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
    factor = torch.full_like(top, INT8_MAX) / top  # dividing a number by a tensor multiplies by a rounded reciprocal
    return (x * factor[..., None, None]).round().to(torch.int8), top / torch.full_like(top, INT8_MAX)


def _fp8_codes(v: Tensor, v_mean: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of v - v_mean as [B, H, D, P], one scale for GROUP tokens."""
    centred = F.pad(v.float() - v_mean[:, :, None], (0, 0, 0, -v.shape[2] % GROUP))
    groups = rearrange(centred, "b h (g n) d -> b h g n d", n=GROUP)
    top = groups.abs().amax(dim=(-2, -1)).clamp_min(SMALLEST)
    limit = torch.full_like(top, FP8_MAX)
    placed = rearrange(groups * (limit / top)[..., None, None], "b h g (n i t e) d -> b h d (g n t i e)", i=2, t=4, e=2)
    return placed.to(torch.float8_e4m3fn).contiguous(), top / limit


def padded(size: int, multiple: int) -> int:
    """The size rounded up to a multiple."""
    return -(-size // multiple) * multiple


@lru_cache
def rotation(head_size: int) -> Tensor:
    """Orthogonal fp32 [D, D]: Hadamard matrices along the diagonal, of powers of two (72 = 64 + 8, 256 = 128 + 128)."""
    blocks = [ROTATED] * (head_size // ROTATED)
    blocks += [1 << bit for bit in range(ROTATED.bit_length() - 2, -1, -1) if head_size >> bit & 1]
    matrix: Tensor = torch.block_diag(*(_hadamard(size) / math.sqrt(size) for size in blocks))
    return matrix


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix
