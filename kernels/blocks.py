"""Block lists: which key blocks each query block computes."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK_SIZES = (16, 32, 64, 128)


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
