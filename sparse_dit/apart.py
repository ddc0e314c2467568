"""Calls that one block list in one order cannot tell: heads left out, and queries and keys in orders of their own."""

import functools
from dataclasses import replace

import torch
from einops import rearrange

from sparse_dit.kernels.gather import in_token_order
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.kernels.ordered import in_order
from sparse_dit.orders import Clusters, Rows
from sparse_dit.selection import Call, Chosen, Dynamic


def attend_chosen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: Chosen,
    *,
    scale: float,
    precision: str,
    skipped: str = "drop",
    pv_threshold: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention along what was chosen.

    Args:
        q, k, v: [B, H, S, D] in the model's order.
        chosen: what to compute.
        scale: factor on the scores.
        precision: one of `PRECISIONS`.
        skipped, pv_threshold: as `block_sparse_attention`, for the heads that are computed.

    Returns:
        out [B, H, S, D] in q's dtype and lse fp32 [B, H, S] in the model's order; zeros and -inf for heads that are
        left out.
    """
    heads = chosen.heads
    if heads is not None:
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
        if len(heads):
            q, k, v = (x.index_select(1, heads) for x in (q, k, v))
            part = attend_chosen(
                q,
                k,
                v,
                chosen._replace(heads=None),
                scale=scale,
                precision=precision,
                skipped=skipped,
                pv_threshold=pv_threshold,
            )
            out, lse = out.index_copy(1, heads, part[0]), lse.index_copy(1, heads, part[1])
        return out, lse
    attend = functools.partial(
        block_sparse_attention, scale=scale, precision=precision, skipped=skipped, pv_threshold=pv_threshold
    )
    if chosen.key_table is None:
        return attend(q, k, v, chosen.blocks, order=chosen.table, ordered=chosen.ordered)
    assert chosen.table is not None
    batch = q.shape[0]
    q, k, v = (_folded(x) for x in (q, k, v))
    ordered = chosen.ordered or in_order(q, k, v, chosen.table, chosen.key_table)
    if skipped == "drop":
        done = attend(q, k, v, chosen.blocks, order=chosen.table, ordered=ordered)
    else:
        # Summaries are made of keys in the order of the queries.
        done = in_token_order(*attend(*ordered, chosen.blocks), chosen.table)
    out, lse = (rearrange(x, "1 (b h) ... -> b h ...", b=batch) for x in done)
    return out, lse


def choose_clustered(
    order: Clusters,
    selection: Dynamic,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    *,
    refresh: bool,
    keeps: bool,
) -> Chosen:
    """What a selection chooses among blocks of clustered tokens.

    Args:
        order: how tokens are clustered.
        selection: judges blocks by q and k alone, and needs no whole call.
        q, k, v: [B, H, S, D] in the model's order.
        call: everything else; its tables are not read. Batch entries become heads.
        refresh: whether to cluster and choose anew, instead of what was kept at the last refresh.
        keeps: whether to keep what was chosen (`Schedule.keeps`).
    """
    call = replace(call, orders=(Rows(),))
    if not refresh:
        tables = call.slot["q_order"].long(), call.slot["k_order"].long()
        return selection.recall(call)._replace(table=tables[0], key_table=tables[1])
    tables = order.tables(q, k, call.layout, call.slot)
    call = replace(call, tables=tables[:1], key_table=tables[1])
    chosen = selection.choose(_folded(q), _folded(k), _folded(v), call)
    assert chosen is not None
    if keeps:
        selection.keep(chosen, call)
        call.slot["q_order"], call.slot["k_order"] = (table.int() for table in tables)
    return chosen


def _folded(x: torch.Tensor) -> torch.Tensor:
    """Batch entries as heads, since tables and block lists of every entry differ."""
    return rearrange(x, "b h ... -> 1 (b h) ...")
