"""Attention along a block list in plain torch: truly sparse on any device, fast on a CPU.

Query blocks with the same key blocks become one longer query, and queries with equally many key blocks are computed in
one batched call, over keys gathered for that call alone. Heads that share a list are gathered together.
"""

import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from weakref import ReferenceType, ref

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_dit.kernels.quantize import Quantized

# Elements of K gathered at once. Half a million in fp32 is 2 MB, and as much for V: still in cache when they are used.
# All gathers use one buffer, and a small one: fresh pages from the system can cost as much as the attention itself.
GATHERED = 2**19
# Elements of the score matrix held at once where no fused attention is at hand.
SCORES = 2**24


@dataclass(frozen=True)
class _Group:
    """Calls of one shape: `queries` [G, m] and `keys` [G, n] number blocks; call g attends queries[g] to keys[g]."""

    queries: Tensor
    keys: Tensor
    tail: bool  # each call's last key block is the ragged one at the end of the sequence


@dataclass(frozen=True)
class _Plan:
    """The groups of each batch entry's lists, and what they were made from."""

    groups: list[list[_Group]]
    counts: ReferenceType[Tensor]
    made_from: tuple[int, int, int, bool]


# A static list serves hundreds of calls: its plan lives exactly as long as its indices do.
_plans: MutableMapping[Tensor, _Plan] = WeakTensorKeyDictionary()


def host_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    pv_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The contract of `ops.block_sparse_attention`, arguments already checked."""
    batch, heads, seq_q, head_size = q.shape
    seq_k = k.shape[2]
    out = torch.empty(batch, seq_q, heads, head_size, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device)
    plan = _plan(indices, counts, -(-seq_k // block_k), seq_k % block_k != 0)
    cut = {"lh": indices.shape[1]}
    attend = _fused_attention if q.device.type == "cpu" else _explicit_attention
    if pv_threshold is not None:
        attend = partial(_skipping_attention, block_q=block_q, block_k=block_k, pv_threshold=pv_threshold)
    for entry in range(batch):
        # One batch entry at a time: as most models lay out memory its blocks are then views, cut without a copy.
        q_blocks, k_blocks, v_blocks = (
            rearrange(_whole_blocks(x[entry], block), "(lh sh) (n i) d -> (lh n) i sh d", **cut, i=block)
            for x, block in ((q, block_q), (k, block_k), (v, block_k))
        )
        groups = plan.groups[entry % len(plan.groups)]
        out_blocks, lse_blocks = _attend_groups(q_blocks, k_blocks, v_blocks, groups, -seq_k % block_k, scale, attend)
        out[entry] = rearrange(out_blocks, "(lh n) i sh d -> (n i) (lh sh) d", **cut)[:seq_q]
        lse[entry] = rearrange(lse_blocks, "(lh n) i sh -> (lh sh) (n i)", **cut)[:, :seq_q]
    return rearrange(out, "b s h d -> b h s d"), lse


def host_quantized_attention(
    codes: Quantized,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    dtype: torch.dtype,
    pv_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention on what the codes stand for, in fp32: out in `dtype`, in the codes' order. Not faster, equally rounded.

    Only the rounding of the weights to the dtype of v is left out.
    """
    q, k, v = codes.dequantized()
    out, lse = host_attention(q, k, v, indices, counts, block_q, block_k, math.log(2), pv_threshold)
    return out.to(dtype), lse.add_(codes.lse_shift)


def _attend_groups(
    q_blocks: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    groups: list[_Group],
    missing: int,
    scale: float,
    attend: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Blocks [blocks, tokens, heads, D] -> out like q_blocks, lse [blocks, tokens, heads].

    The heads share their lists. The last key block lacks `missing` tokens. `attend` computes a call, all keys visible.
    """
    out = torch.empty(q_blocks.shape, dtype=q_blocks.dtype, device=q_blocks.device)
    lse = torch.empty(q_blocks.shape[:3], dtype=torch.float32, device=q_blocks.device)
    at_once = max(1, GATHERED // k_blocks[0].numel())
    most = max(max(group.keys.shape[1], min(group.keys.numel(), at_once)) for group in groups)
    k_buffer, v_buffer = torch.empty(2, most, *k_blocks.shape[1:], dtype=k_blocks.dtype, device=k_blocks.device)
    for group in groups:
        m, n = group.queries.shape[1], group.keys.shape[1]
        valid = n * k_blocks.shape[1] - group.tail * missing
        calls = max(1, at_once // n)
        for rows, listed in zip(torch.split(group.queries, calls), torch.split(group.keys, calls), strict=True):
            rows, listed = rows.flatten(), listed.flatten()
            gathered_k = torch.index_select(k_blocks, 0, listed, out=k_buffer[: len(listed)])
            gathered_v = torch.index_select(v_blocks, 0, listed, out=v_buffer[: len(listed)])
            part_out, part_lse = attend(
                rearrange(q_blocks.index_select(0, rows), "(g m) i h d -> g h (m i) d", m=m),
                rearrange(gathered_k, "(g n) j h d -> g h (n j) d", n=n)[:, :, :valid],
                rearrange(gathered_v, "(g n) j h d -> g h (n j) d", n=n)[:, :, :valid],
                scale,
            )
            out.index_copy_(0, rows, rearrange(part_out, "g h (m i) d -> (g m) i h d", m=m))
            lse.index_copy_(0, rows, rearrange(part_lse, "g h (m i) -> (g m) i h", m=m))
    return out, lse


def _whole_blocks(x: Tensor, block: int) -> Tensor:
    """x [H, S, D] with its last token again until the last block is full: queries that skip what the last one skips."""
    missing = -x.shape[-2] % block
    return torch.cat((x, x[:, -1:].expand(-1, missing, -1)), dim=1) if missing else x


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[G, S, m, D], [G, S, n, D] -> out [G, S, m, D], lse [G, S, m]. SDPA's own CPU kernel; sums run in fp32."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return out, lse


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same where torch has no fused kernel that returns LSE, a bounded part of the scores at a time."""
    key, value = rearrange(k.float(), "g s n d -> g s d n"), v.float()
    outs, lses = [], []
    for query in torch.split(q, max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2])), dim=2):
        scores = (query.float() * scale) @ key
        top = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        outs.append((weights @ value).div_(total).to(q.dtype))
        lses.append((top + total.log()).squeeze(-1))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _skipping_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, block_q: int, block_k: int, pv_threshold: float
) -> tuple[Tensor, Tensor]:
    """The same, a key block at a time, without the value products that `pv_threshold` leaves out."""
    top = torch.full(q.shape[:3], -torch.inf, device=q.device)
    total, out = torch.zeros_like(top), torch.zeros(q.shape, device=q.device)
    for key, value in zip(torch.split(k, block_k, dim=2), torch.split(v, block_k, dim=2), strict=True):
        scores = (q.float() * scale) @ rearrange(key.float(), "g s n d -> g s d n")
        tile_top = scores.amax(dim=-1)
        new_top = torch.maximum(top, tile_top)
        weights, decay = (scores - new_top[..., None]).exp(), (top - new_top).exp()
        top, total = new_top, total * decay + weights.sum(dim=-1)
        taken = rearrange(tile_top >= new_top - pv_threshold, "g s (m i) -> g s m i", i=block_q).any(dim=-1)
        # Chosen, not multiplied by 0: what is left out may hold anything.
        product = (weights @ value.float()).where(taken.repeat_interleave(block_q, dim=-1)[..., None], 0.0)
        out = out * decay[..., None] + product
    return (out / total[..., None]).to(q.dtype), top + total.log()


def _plan(indices: Tensor, counts: Tensor, key_blocks: int, ragged: bool) -> _Plan:
    made_from = (_version(indices), _version(counts), key_blocks, ragged)
    plan = _plans.get(indices)
    if plan is None or plan.counts() is not counts or plan.made_from != made_from:
        groups = [_groups(*lists, key_blocks, ragged) for lists in zip(indices, counts, strict=True)]
        plan = _plans[indices] = _Plan(groups, ref(counts), made_from)
    return plan


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode do not count their changes.
    return 0 if tensor.is_inference() else tensor._version


def _groups(indices: Tensor, counts: Tensor, key_blocks: int, ragged: bool) -> list[_Group]:
    """Takes the lists of one batch entry apart: indices [H or 1, QB, capacity], counts [H or 1, QB]."""
    q_blocks, capacity = indices.shape[1:]
    device = indices.device
    unused = torch.arange(capacity, device=device) >= counts.flatten()[:, None]
    keys = indices.reshape(-1, capacity).long().masked_fill_(unused, -1)
    # Blocks are numbered over all lists, as the blocks of q and k are: rows of different lists are never the same.
    own_list = torch.arange(len(keys), device=device)[:, None] // q_blocks
    keys = torch.where(keys < 0, -1, keys + own_list * key_blocks)
    distinct, row_to_call, m = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    rows = row_to_call.argsort(stable=True)
    first = m.cumsum(0) - m
    n = (distinct >= 0).sum(dim=1)
    last = distinct.gather(1, n[:, None] - 1).squeeze(1)
    tail = (last % key_blocks == key_blocks - 1) & ragged
    shapes, call_to_shape = torch.unique(torch.stack((m, n, tail.long()), dim=1), dim=0, return_inverse=True)
    groups = []
    for number, (size_m, size_n, has_tail) in enumerate(shapes.tolist()):
        calls = (call_to_shape == number).nonzero().squeeze(1)
        queries = rows[first[calls, None] + torch.arange(size_m, device=device)]
        groups.append(_Group(queries, distinct[calls, :size_n], bool(has_tail)))
    return groups
