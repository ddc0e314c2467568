"""Attention along a block list in plain torch: truly sparse on any device, fast on a CPU.

Query blocks with the same key blocks become one longer query, and queries with equally many key blocks are computed in
one batched call, over keys gathered for that call alone. Heads that share a list are gathered together.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Elements of K gathered at once. A million in fp32 is 4 MB, and as much for V: few calls, and still in a shared cache
# when they are used. All gathers use one buffer: fresh pages for each can cost as much as the attention itself.
GATHERED = 2**20
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
    """The groups of a list, and what they were made from."""

    groups: list[_Group]
    counts: ReferenceType[Tensor]
    made_from: tuple[int, int, int, bool]


# A static list serves hundreds of calls: its plan lives exactly as long as its indices do.
_plans: MutableMapping[Tensor, _Plan] = WeakTensorKeyDictionary()


def host_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block_q: int, block_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The contract of `ops.block_sparse_attention`, arguments already checked."""
    seq_q, seq_k = q.shape[2], k.shape[2]
    lists = {"lb": indices.shape[0], "lh": indices.shape[1]}
    q_blocks, k_blocks, v_blocks = (
        rearrange(_whole_blocks(x, block), "(lb sb) (lh sh) (n i) d -> (lb lh n) i (sb sh) d", **lists, i=block)
        for x, block in ((q, block_q), (k, block_k), (v, block_k))
    )
    out = torch.empty(q_blocks.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q_blocks.shape[:3], dtype=torch.float32, device=q.device)

    groups = _plan(indices, counts, -(-seq_k // block_k), seq_k % block_k != 0).groups
    at_once = max(1, GATHERED // k_blocks[0].numel())
    most = max(max(group.keys.shape[1], min(group.keys.numel(), at_once)) for group in groups)
    k_buffer, v_buffer = torch.empty(2, most, *k_blocks.shape[1:], dtype=k.dtype, device=k.device)
    attend = _fused_attention if q.device.type == "cpu" else _explicit_attention
    for group in groups:
        m, n = group.queries.shape[1], group.keys.shape[1]
        valid = n * block_k - group.tail * (-seq_k % block_k)
        calls = max(1, at_once // n)
        for rows, listed in zip(torch.split(group.queries, calls), torch.split(group.keys, calls), strict=True):
            rows, listed = rows.flatten(), listed.flatten()
            gathered_k = torch.index_select(k_blocks, 0, listed, out=k_buffer[: len(listed)])
            gathered_v = torch.index_select(v_blocks, 0, listed, out=v_buffer[: len(listed)])
            part_out, part_lse = attend(
                rearrange(q_blocks.index_select(0, rows), "(g m) i s d -> g s (m i) d", m=m),
                rearrange(gathered_k, "(g n) j s d -> g s (n j) d", n=n)[:, :, :valid],
                rearrange(gathered_v, "(g n) j s d -> g s (n j) d", n=n)[:, :, :valid],
                scale,
            )
            out.index_copy_(0, rows, rearrange(part_out, "g s (m i) d -> (g m) i s d", m=m))
            lse.index_copy_(0, rows, rearrange(part_lse, "g s (m i) -> (g m) i s", m=m))

    # With lists shared by all heads of one batch entry, the blocks of out already lie as tokens do.
    lists |= {"sb": q.shape[0] // lists["lb"]}
    out = rearrange(out, "(lb lh n) i (sb sh) d -> (lb sb) (n i) (lh sh) d", **lists)[:, :seq_q].contiguous()
    lse = rearrange(lse, "(lb lh n) i (sb sh) -> (lb sb) (lh sh) (n i)", **lists)[..., :seq_q].contiguous()
    return rearrange(out, "b s h d -> b h s d"), lse


def _whole_blocks(x: Tensor, block: int) -> Tensor:
    missing = -x.shape[2] % block
    return F.pad(x, (0, 0, 0, missing)) if missing else x


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


def _plan(indices: Tensor, counts: Tensor, key_blocks: int, ragged: bool) -> _Plan:
    made_from = (_version(indices), _version(counts), key_blocks, ragged)
    plan = _plans.get(indices)
    if plan is None or plan.counts() is not counts or plan.made_from != made_from:
        plan = _plans[indices] = _Plan(_groups(indices, counts, key_blocks, ragged), ref(counts), made_from)
    return plan


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode do not count their changes.
    return 0 if tensor.is_inference() else tensor._version


def _groups(indices: Tensor, counts: Tensor, key_blocks: int, ragged: bool) -> list[_Group]:
    q_blocks, capacity = indices.shape[2:]
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
