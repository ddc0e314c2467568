"""The only door into this folder: block lists, and attention along them as a torch operator.

Backends are imported when they first run, so importing this module loads torch alone.
"""

import math
import os
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

BLOCK_SIZES = (16, 32, 64, 128)
BACKENDS = ("triton", "host")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# In fp32 (three TF32 products) the kernel ended in a CUDA error on an H200 with Triton 3.6; the cause is not known yet.
TRITON_CUDA_DTYPES = (torch.float16, torch.bfloat16)
TRITON_HEAD_SIZES = (64, 72, 88, 96, 128, 256)


@dataclass(frozen=True, eq=False)
class BlockList:
    """The key blocks that each query block computes.

    Entries are checked once, here, so that no attention call has to read them back from a GPU: without `key_blocks` the
    constructor reads the lists (and waits for the device) and refuses bad ones; with `key_blocks` it takes the caller's
    word for the entries and reads nothing. Treat the tensors as frozen afterwards.

    Attributes:
        indices: int32 [B or 1, H or 1, QB, capacity]; the first counts[...] entries of a row are distinct key blocks in
            ascending order, the rest of the row is never read. Size 1 means shared by all batch entries or heads.
        counts: int32 [B or 1, H or 1, QB], key blocks a row, each in [1, capacity].
        block_q: query tokens a block, one of BLOCK_SIZES.
        block_k: key tokens a block, one of BLOCK_SIZES.
        key_blocks: every entry is below this many blocks; 0 reads it from the lists.

    Raises:
        ValueError: a shape, dtype, device, block size or entry is not as above.
    """

    indices: Tensor
    counts: Tensor
    block_q: int
    block_k: int
    key_blocks: int = 0

    def __post_init__(self) -> None:
        for name, size in (("block_q", self.block_q), ("block_k", self.block_k)):
            if size not in BLOCK_SIZES:
                raise ValueError(f"{name}: {size!r}; valid: one of {BLOCK_SIZES}")
        for name, tensor, ndim in (("indices", self.indices, 4), ("counts", self.counts, 3)):
            if tensor.dtype is not torch.int32 or tensor.ndim != ndim or 0 in tensor.shape:
                raise ValueError(
                    f"{name}: {tensor.dtype} {list(tensor.shape)}; valid: torch.int32, {ndim} dimensions, none empty"
                )
        if self.counts.shape != self.indices.shape[:3]:
            raise ValueError(
                f"counts: shape {list(self.counts.shape)}; valid: {list(self.indices.shape[:3])}, the rows of indices"
            )
        if self.counts.device != self.indices.device:
            raise ValueError(f"counts: on {self.counts.device}; valid: {self.indices.device}, where indices is")
        if self.key_blocks < 0:
            raise ValueError(f"key_blocks: {self.key_blocks}; valid: at least 1, or 0 to read it from the lists")
        if self.key_blocks == 0:
            object.__setattr__(self, "key_blocks", self._checked_key_blocks())

    def _checked_key_blocks(self) -> int:
        lowest, highest = self.counts.min(), self.counts.max()
        if lowest < 1:
            raise ValueError(f"counts: a row has {int(lowest)} key blocks; valid: at least 1 in every row")
        if highest > self.indices.shape[-1]:
            raise ValueError(f"counts: {int(highest)}; valid: at most {self.indices.shape[-1]}, the width of indices")
        unused = self.unused()
        if self.indices.masked_fill(unused, 0).min() < 0:
            raise ValueError("indices: an entry is negative; valid: key blocks counted from 0")
        if (self.indices.diff(dim=-1) <= 0).masked_fill(unused[..., 1:], False).any():
            raise ValueError("indices: a row does not ascend; valid: distinct key blocks in ascending order")
        return int(self.indices.masked_fill(unused, 0).max()) + 1

    def unused(self) -> Tensor:
        """Bool [B or 1, H or 1, QB, capacity]: true behind a row's count."""
        return torch.arange(self.indices.shape[-1], device=self.counts.device) >= self.counts[..., None]

    def density(self, seq_q: int, seq_k: int) -> float:
        """Computed tile area over full area, blocks at a ragged end counted by their true size. Reads the lists back.

        Args:
            seq_q: query tokens.
            seq_k: key tokens.

        Returns:
            A fraction in (0, 1], the mean over the lists' batch entries and heads.

        Raises:
            ValueError: the lists are not made for these lengths.
        """
        self.check_lengths(seq_q, seq_k)
        tail_q = seq_q - (self.indices.shape[2] - 1) * self.block_q
        tail_k = seq_k - (math.ceil(seq_k / self.block_k) - 1) * self.block_k
        is_tail = (self.indices == seq_k // self.block_k).masked_fill(self.unused(), False).any(dim=-1)
        width = self.counts.long() * self.block_k - is_tail * (self.block_k - tail_k) * (seq_k % self.block_k != 0)
        area = width.sum() * self.block_q - width[..., -1].sum() * (self.block_q - tail_q)
        return int(area) / (self.indices.shape[0] * self.indices.shape[1] * seq_q * seq_k)

    def check_lengths(self, seq_q: int, seq_k: int) -> None:
        """Raises ValueError unless the rows cover `seq_q` query tokens and no entry lies beyond `seq_k` key tokens."""
        rows, need = self.indices.shape[2], math.ceil(seq_q / self.block_q)
        if rows != need:
            raise ValueError(f"blocks: {rows} query blocks of {self.block_q}; valid: {need} for {seq_q} query tokens")
        limit = math.ceil(seq_k / self.block_k)
        if self.key_blocks > limit:
            raise ValueError(
                f"blocks: lists over {self.key_blocks} key blocks of {self.block_k}; valid: at most {limit} "
                f"for {seq_k} key tokens"
            )

    def to(self, device: torch.device | str) -> "BlockList":
        """The same lists on another device."""
        return replace(self, indices=self.indices.to(device), counts=self.counts.to(device))


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, *, scale: float | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query block over its listed key blocks; inference only.

    lse_i = log sum_j exp(scale q_i.k_j), out_i = sum_j exp(scale q_i.k_j - lse_i) v_j, j over the tokens of the key
    blocks listed for the block of i. Softmax and sums run in fp32 whatever the inputs. The online softmax over blocks
    is FlashAttention's (Dao et al. 2022, arXiv:2205.14135, algorithm 1).

    Args:
        q: queries [B, H, Sq, D], fp16, bf16 or fp32, any strides.
        k: keys [B, H, Sk, D], like q.
        v: values [B, H, Sk, D], like q.
        blocks: the lists, on q's device; ceil(Sq / block_q) rows, entries below ceil(Sk / block_k).
        scale: positive factor on the scores; None is 1 / sqrt(D).
        backend: "triton" or "host"; None is what `default_backend` says.

    Returns:
        out [B, H, Sq, D] in q's dtype, laid out in memory as [B, Sq, H, D]; lse fp32 [B, H, Sq], natural log.

    Raises:
        ValueError: an argument is not as above, or the backend cannot run it.
    """
    _check_tensors(q, k, v)
    _check_blocks(q, k, blocks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: {scale!r}; valid: a positive finite number, or None for 1 / sqrt(D)")
    backend = _chosen_backend(q, backend)
    out, lse = _block_sparse_attention(
        q, k, v, blocks.indices, blocks.counts, blocks.block_q, blocks.block_k, scale, backend
    )
    return out, lse


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in DTYPES:
        raise ValueError(f"q: {q.dtype}; valid: one of {', '.join(map(str, DTYPES))}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(f"{name}: shape {list(tensor.shape)}; valid: a non-empty tensor [B, H, S, D]")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}; valid: {q.dtype} on {q.device}, like q")
    expected = [*q.shape[:2], k.shape[2], q.shape[3]]
    for name, tensor in (("k", k), ("v", v)):
        if list(tensor.shape) != expected:
            raise ValueError(f"{name}: shape {list(tensor.shape)}; valid: {expected}, by the shapes of q and k")


def _check_blocks(q: Tensor, k: Tensor, blocks: BlockList) -> None:
    if blocks.indices.device != q.device:
        raise ValueError(f"blocks: on {blocks.indices.device}; valid: {q.device}, where q is (see BlockList.to)")
    for name, size, full in (
        ("batch entries", blocks.indices.shape[0], q.shape[0]),
        ("heads", blocks.indices.shape[1], q.shape[1]),
    ):
        if size not in (1, full):
            raise ValueError(f"blocks: lists for {size} {name}; valid: 1 or {full}, as q has")
    blocks.check_lengths(q.shape[2], k.shape[2])


def default_backend(q: Tensor) -> str:
    """The backend that None stands for: "triton" for 16-bit CUDA tensors, "host" for all others."""
    return "triton" if q.is_cuda and q.dtype in TRITON_CUDA_DTYPES else "host"


def _chosen_backend(q: Tensor, backend: str | None) -> str:
    chosen = default_backend(q) if backend is None else backend
    if chosen not in BACKENDS:
        raise ValueError(f"backend: {backend!r}; valid: one of {BACKENDS}, or None to choose by device and dtype")
    if chosen == "triton" and q.is_cuda and q.dtype not in TRITON_CUDA_DTYPES:
        raise ValueError(f"q: {q.dtype}; valid for backend 'triton' on CUDA: one of {TRITON_CUDA_DTYPES}")
    if chosen == "triton" and not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend: 'triton' with tensors on {q.device}; valid: CUDA tensors, or backend 'host'")
    if chosen == "triton" and not q.is_cuda and q.dtype is torch.bfloat16:
        # The interpreter multiplies the bits of bfloat16 as integers.
        raise ValueError("q: torch.bfloat16; valid in Triton's interpreter: torch.float16 or torch.float32")
    if chosen == "triton" and q.shape[-1] not in TRITON_HEAD_SIZES:
        raise ValueError(f"q: head size {q.shape[-1]}; valid for backend 'triton': one of {TRITON_HEAD_SIZES}")
    return chosen


@torch.library.custom_op("sparse_dit::block_sparse_attention", mutates_args=())
def _block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from sparse_dit.kernels.attention import triton_attention as attention
    else:
        from sparse_dit.kernels.host import host_attention as attention
    return attention(q, k, v, indices, counts, block_q, block_k, scale)


@_block_sparse_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, heads, seq_q, head_size = q.shape
    out = rearrange(q.new_empty(batch, seq_q, heads, head_size), "b s h d -> b h s d")
    return out, q.new_empty(batch, heads, seq_q, dtype=torch.float32)
