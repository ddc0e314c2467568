"""Triton: a row of scores to its block list, one program a row, without a sort.

A selection is a prefix of the row in descending order, equal scores by ascending index. Its last value is found bit by
bit, from the highest: a binary search over the bit patterns of floats, which in the right encoding ascend as the floats
do. Names as in `attention`: `i_` program index, `p_` pointer, `o_` offsets, `m_` mask, `b_` values on chip.
"""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_dit.kernels.launches import device_of, launch_kernel, power_of_2

LOWEST = tl.constexpr(-(2**31))
RULES = ("mask", "top_k", "top_p", "top_p_crossing", "threshold")


@triton.jit
def _key(b_score):
    """int32 that ascend as the scores do; -0 is 0."""
    b_bits = tl.where(b_score == 0, 0.0, b_score).to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _goes_on(count, total, budget, at_least, RULE: tl.constexpr):
    """Whether a prefix of `count` keys that weigh `total` is long enough, or too long by its last key."""
    if RULE == "top_k":
        return count >= budget
    elif RULE == "top_p_crossing":
        return (count >= at_least) & (total >= budget)
    else:
        return (count >= at_least) & (total > budget)


@triton.jit
def _prefix(b_key, b_weight, budget, at_least, RULE: tl.constexpr):
    """Marks the largest keys by RULE, lower indices first among equals. LOWEST is never marked. [WIDTH]

    The last value is searched between `bound`, from which on keys are enough, and `beyond`, from which on they are not:
    until a single key lies between, or as many as are wanted lie from the bound on, or the value is known to the last
    bit and several have it.
    """
    LONG: tl.constexpr = 1 << 30
    bound, beyond = tl.full([], LOWEST, tl.int32), tl.full([], 0x7FFFFFFF, tl.int32)
    count, above = tl.full([], LONG, tl.int32), tl.full([], 0, tl.int32)
    total_above = tl.full([], 0.0, tl.float32)
    i, is_known = tl.full([], 31, tl.int32), count - above == 1
    while (i >= 0) & (is_known == 0):
        higher = bound + (1 << i)  # of the first bit it overflows, from LOWEST to 0
        m_key = b_key >= higher
        new_count = tl.sum(m_key.to(tl.int32), 0)
        new_total = total_above if RULE == "top_k" else tl.sum(tl.where(m_key, b_weight, 0.0), 0)
        goes_on = _goes_on(new_count, new_total, budget, at_least, RULE)
        bound, count = tl.where(goes_on, higher, bound), tl.where(goes_on, new_count, count)
        beyond, above = tl.where(goes_on, beyond, higher), tl.where(goes_on, above, new_count)
        total_above = tl.where(goes_on, total_above, new_total)
        is_known = count - above == 1
        if RULE == "top_k":
            is_known |= count == budget
        i -= 1
    if is_known:
        m = b_key >= bound
        if RULE == "top_p":  # takes it only to have enough
            m = b_key >= tl.where(above < at_least, bound, beyond)
    else:
        m_equal = (b_key == bound) & (b_key > LOWEST)
        b_place = tl.cumsum(m_equal.to(tl.int32), 0)  # from 1
        if RULE == "top_k":
            m_fits = above + b_place <= budget
        elif RULE == "top_p_crossing":
            m_fits = (above + b_place <= at_least) | (total_above + (b_place - 1).to(tl.float32) * b_weight < budget)
        else:
            m_fits = (above + b_place <= at_least) | (total_above + b_place.to(tl.float32) * b_weight <= budget)
        m = (b_key > bound) | (m_equal & m_fits)
    return m


@triton.jit
def _best(b_key, o):
    """Marks the largest key, the first of equals, unless it is LOWEST. [WIDTH]"""
    best = tl.max(b_key, 0)
    first = tl.min(tl.where(b_key == best, o, 1 << 30), 0)
    return (o == first) & (b_key > LOWEST)


@triton.jit
def _places(m, WIDTH: tl.constexpr):
    """How many are marked before each, [WIDTH]: both halves in one scan, each in 16 bits."""
    o_half = tl.arange(0, 2)[:, None]
    b_halves = m.to(tl.int32).reshape([2, WIDTH // 2])
    b_both = tl.cumsum(tl.sum(b_halves << (o_half * 16), 0), 0)
    low = tl.sum(tl.sum(tl.where(o_half == 0, b_halves, 0), 0), 0)
    b_place = tl.where(o_half == 0, b_both[None, :] & 0xFFFF, low + (b_both >> 16)[None, :])
    return (b_place - b_halves).reshape([WIDTH])


@triton.jit
def select_kernel(
    p_scores,
    p_budget,
    p_forced,
    p_columns,
    p_indices,
    p_counts,
    s_batch,
    s_head,
    s_row,
    s_column,
    b_batch,
    b_head,
    b_row,
    f_batch,
    f_head,
    f_row,
    f_column,
    k_blocks,
    capacity,
    budget,
    at_least,
    RULE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    FORCED: tl.constexpr,
    MAPPED: tl.constexpr,
    PER_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Selects key blocks of one row by RULE and writes their indices, ascending, and their count.

    Floor: scores and lists once, 6 + 2 MB for 12 heads of 256 x 512 blocks at density 0.3; the search takes about
    20 comparisons and additions a score, 32 where values repeat.
    """
    i_row, i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o = tl.arange(0, WIDTH)
    m = o < k_blocks
    o_column = tl.load(p_columns + o, mask=m, other=0) if MAPPED else o
    b_score = tl.load(p_scores + i_b * s_batch + i_h * s_head + i_row * s_row + o_column * s_column, mask=m, other=0)
    if PER_ROW:
        budget = tl.load(p_budget + i_b * b_batch + i_h * b_head + i_row * b_row)
    m_forced = o < 0
    if FORCED:
        p_forced += i_b * f_batch + i_h * f_head + i_row * f_row
        m_forced = (tl.load(p_forced + o * f_column, mask=m, other=0) != 0) & m
    if RULE == "mask":
        m_selected = m & (b_score != 0)
    else:
        b_score = b_score.to(tl.float32)
        if SOFTMAX:
            b_score = tl.where(m, b_score, float("-inf"))
            b_score = tl.exp(b_score - tl.max(b_score, 0))
            b_score /= tl.sum(b_score, 0)
        b_key = tl.where(m, _key(b_score), LOWEST)
        if RULE == "threshold":
            mean = tl.sum(tl.where(m, b_score, 0.0), 0) / k_blocks
            b_off = tl.where(m, b_score - mean, 0.0)
            m_selected = m & (b_score >= mean + budget * tl.sqrt(tl.sum(b_off * b_off, 0) / k_blocks))
            m_selected |= _best(b_key, o)
        else:
            if RULE == "top_k":
                b_key = tl.where(m_forced, LOWEST, b_key)
            m_selected = _prefix(b_key, b_score, budget, at_least, RULE)
    m_selected |= m_forced
    b_place = _places(m_selected, WIDTH)
    o_row = (i_b * tl.num_programs(1) + i_h) * tl.num_programs(0) + i_row
    tl.store(p_indices + o_row * capacity + b_place, o, mask=m_selected & (b_place < capacity))
    tl.store(p_counts + o_row, tl.minimum(tl.sum(m_selected.to(tl.int32), 0), capacity))


def warps_for(k_blocks: int) -> int:
    """Warps a program: one exchanges sums without shared memory; 16 scores a thread leave registers to other rows."""
    return int(min(16, max(1, power_of_2(k_blocks) // 512)))


def constants(
    rule: str, k_blocks: int, *, forced: bool, per_row: bool, mapped: bool = False, softmax: bool = False
) -> dict[str, object]:
    """The kernel's compile-time arguments."""
    width = max(2, power_of_2(k_blocks))
    return {"RULE": rule, "SOFTMAX": softmax, "FORCED": forced, "MAPPED": mapped, "PER_ROW": per_row, "WIDTH": width}


def triton_lists(
    rule: str,
    scores: Tensor,
    capacity: int,
    budget: float | Tensor = 0,
    forced: Tensor | None = None,
    at_least: int = 1,
    columns: Tensor | None = None,
    *,
    softmax: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scores [B, H, QB, KB] (for rule "mask" a bool mask) to indices [B, H, QB, capacity] and counts [B, H, QB].

    Args:
        rule: one of RULES.
        scores: as the functions of `lists` take them.
        capacity: width of the list.
        budget: blocks, mass or tau, as the rule reads it; a tensor broadcasts to [B, H, QB].
        forced: as the functions of `lists` take it.
        at_least: best blocks listed by a mass; the other rules but "mask" and "top_k" list one.
        columns: int64 [KB], the column of scores that each key block has; None where each has its own.
        softmax: whether scores are judged by their softmax over the row.
    """
    batch, heads, q_blocks = scores.shape[:3]
    k_blocks = scores.shape[3] if columns is None else len(columns)
    indices = torch.empty(batch, heads, q_blocks, capacity, dtype=torch.int32, device=scores.device)
    counts = torch.empty(batch, heads, q_blocks, dtype=torch.int32, device=scores.device)
    if scores.dtype is torch.bool:
        scores = scores.view(torch.uint8)
    if forced is not None:
        forced = forced.expand(batch, heads, q_blocks, k_blocks).view(torch.uint8)
    per_row = isinstance(budget, Tensor)
    budgets = budget.expand(scores.shape[:3]) if isinstance(budget, Tensor) else None
    fixed = constants(
        rule, k_blocks, forced=forced is not None, per_row=per_row, mapped=columns is not None, softmax=softmax
    )
    with device_of(scores):
        launch_kernel(
            select_kernel, (q_blocks, heads, batch),
            scores, budgets, forced, columns, indices, counts, *scores.stride(),
            *(budgets.stride() if budgets is not None else (0, 0, 0)),
            *(forced.stride() if forced is not None else (0, 0, 0, 0)),
            k_blocks, capacity, 0 if per_row else budget, at_least, **fixed,
            num_warps=warps_for(k_blocks), enable_fp_fusion=True,
        )  # fmt: skip
    return indices, counts
