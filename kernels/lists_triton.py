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
def _count_from(p_scores, bound, size, CHUNK: tl.constexpr):
    """How many of `size` scores have a key of at least `bound`."""
    o = tl.arange(0, CHUNK)
    b_count = tl.zeros([CHUNK], tl.int32)
    for start in range(0, size, CHUNK):
        m = start + o < size
        b_key = _key(tl.load(p_scores + start + o, mask=m, other=0.0))
        b_count += (m & (b_key >= bound)).to(tl.int32)
    return tl.sum(b_count, 0)


@triton.jit
def kth_kernel(p_scores, p_kth, p_budget, budget, size, heads, PER_HEAD: tl.constexpr, CHUNK: tl.constexpr):
    """The budget-th largest of `size` scores of one head: the search of `_largest` over more than one program holds.

    Reads the scores 32 times, from L2.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    p_scores += i_bh * size
    if PER_HEAD:
        budget = tl.load(p_budget + i_bh % heads)
    bound = tl.where(_count_from(p_scores, 0, size, CHUNK) >= budget, 0, LOWEST)
    for i in range(31):
        higher = bound + (1 << (30 - i))
        bound = tl.where(_count_from(p_scores, higher, size, CHUNK) >= budget, higher, bound)
    tl.store(p_kth + i_bh, (bound ^ ((bound >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True))


@triton.jit
def _largest(b_key, budget):
    """Marks the `budget` largest keys, lower indices first among equals. LOWEST is never marked. [WIDTH]"""
    bound = tl.where(tl.sum((b_key >= 0).to(tl.int32), 0) >= budget, 0, LOWEST)
    for i in range(31):
        higher = bound + (1 << (30 - i))
        bound = tl.where(tl.sum((b_key >= higher).to(tl.int32), 0) >= budget, higher, bound)
    m_above = b_key > bound
    m_equal = (b_key == bound) & (b_key > LOWEST)
    left = budget - tl.sum(m_above.to(tl.int32), 0)
    return m_above | (m_equal & (tl.cumsum(m_equal.to(tl.int32), 0) <= left))


@triton.jit
def _reaching(b_key, b_weight, mass, CROSSING: tl.constexpr):
    """Marks the largest keys that sum to `mass` in weight, the one that crosses it only if CROSSING. [WIDTH]"""
    bound = LOWEST
    total = tl.sum(tl.where(b_key >= 0, b_weight, 0.0), 0)
    bound = tl.where((total >= mass) if CROSSING else (total > mass), 0, bound)
    for i in range(31):
        higher = bound + (1 << (30 - i))
        total = tl.sum(tl.where(b_key >= higher, b_weight, 0.0), 0)
        bound = tl.where((total >= mass) if CROSSING else (total > mass), higher, bound)
    m_above = b_key > bound
    m_equal = (b_key == bound) & (b_key > LOWEST)
    above = tl.sum(tl.where(m_above, b_weight, 0.0), 0)
    b_place = tl.cumsum(m_equal.to(tl.int32), 0).to(tl.float32)
    m_fits = (above + (b_place - 1) * b_weight < mass) if CROSSING else (above + b_place * b_weight <= mass)
    return m_above | (m_equal & m_fits)


@triton.jit
def select_kernel(
    p_scores,
    p_budget,
    p_forced,
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
    FORCED: tl.constexpr,
    PER_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Selects key blocks of one row by RULE and writes their indices, ascending, and their count.

    Floor: scores and lists once, 6 + 2 MB for 12 heads of 256 x 512 blocks at density 0.3; the search takes
    32 comparisons and additions a score.
    """
    i_row, i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o = tl.arange(0, WIDTH)
    m = o < k_blocks
    b_score = tl.load(p_scores + i_b * s_batch + i_h * s_head + i_row * s_row + o * s_column, mask=m, other=0)
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
        b_key = tl.where(m, _key(b_score), LOWEST)
        if RULE == "top_k":
            m_selected = _largest(tl.where(m_forced, LOWEST, b_key), budget)
        else:
            m_selected = _largest(b_key, at_least)
        if RULE == "top_p":
            m_selected |= _reaching(b_key, b_score, budget, False)
        elif RULE == "top_p_crossing":
            m_selected |= _reaching(b_key, b_score, budget, True)
        elif RULE == "threshold":
            mean = tl.sum(tl.where(m, b_score, 0.0), 0) / k_blocks
            b_off = tl.where(m, b_score - mean, 0.0)
            m_selected |= m & (b_score >= mean + budget * tl.sqrt(tl.sum(b_off * b_off, 0) / k_blocks))
    m_selected |= m_forced
    b_place = tl.cumsum(m_selected.to(tl.int32), 0) - 1
    o_row = (i_b * tl.num_programs(1) + i_h) * tl.num_programs(0) + i_row
    tl.store(p_indices + o_row * capacity + b_place, o, mask=m_selected & (b_place < capacity))
    tl.store(p_counts + o_row, tl.minimum(tl.sum(m_selected.to(tl.int32), 0), capacity))


def warps_for(k_blocks: int) -> int:
    """Warps a program: one exchanges sums without shared memory; up to 64 scores a thread stay in registers."""
    return min(16, max(1, k_blocks // 1024))


def constants(rule: str, k_blocks: int, *, forced: bool, per_row: bool) -> dict[str, object]:
    """The kernel's compile-time arguments."""
    return {"RULE": rule, "FORCED": forced, "PER_ROW": per_row, "WIDTH": power_of_2(k_blocks)}


def triton_lists(
    rule: str,
    scores: Tensor,
    capacity: int,
    budget: float | Tensor = 0,
    forced: Tensor | None = None,
    at_least: int = 1,
) -> tuple[Tensor, Tensor]:
    """Scores [B, H, QB, KB] (for rule "mask" a bool mask) to indices [B, H, QB, capacity] and counts [B, H, QB].

    Args:
        rule: one of RULES.
        scores: as the functions of `lists` take them.
        capacity: width of the list.
        budget: blocks, mass or tau, as the rule reads it; a tensor broadcasts to [B, H, QB].
        forced: as the functions of `lists` take it.
        at_least: best blocks listed whatever the rule, but for "mask" and "top_k".
    """
    batch, heads, q_blocks, k_blocks = scores.shape
    indices = torch.empty(batch, heads, q_blocks, capacity, dtype=torch.int32, device=scores.device)
    counts = torch.empty(batch, heads, q_blocks, dtype=torch.int32, device=scores.device)
    if scores.dtype is torch.bool:
        scores = scores.view(torch.uint8)
    if forced is not None:
        forced = forced.expand(scores.shape).view(torch.uint8)
    per_row = isinstance(budget, Tensor)
    budgets = budget.expand(scores.shape[:3]) if isinstance(budget, Tensor) else None
    fixed = constants(rule, k_blocks, forced=forced is not None, per_row=per_row)
    with device_of(scores):
        launch_kernel(
            select_kernel, (q_blocks, heads, batch),
            scores, budgets, forced, indices, counts, *scores.stride(),
            *(budgets.stride() if budgets is not None else (0, 0, 0)),
            *(forced.stride() if forced is not None else (0, 0, 0, 0)),
            k_blocks, capacity, 0 if per_row else budget, at_least, **fixed,
            num_warps=warps_for(k_blocks), enable_fp_fusion=True,
        )  # fmt: skip
    return indices, counts


# Scores of a head that a program of kth_kernel holds at once, and its warps: on AMD, 16 are the most.
KTH_CHUNK, KTH_WARPS = 16_384, 16


def triton_kth(scores: Tensor, budget: int | Tensor) -> Tensor:
    """The budget-th largest score of each head: contiguous fp32 [B, H, N] and an int or [H] to fp32 [B, H]."""
    batch, heads, size = scores.shape
    kth = torch.empty(batch, heads, dtype=torch.float32, device=scores.device)
    per_head = isinstance(budget, Tensor)
    with device_of(scores):
        launch_kernel(
            kth_kernel, (batch * heads,),
            scores, kth, budget if per_head else None, 0 if per_head else budget, size, heads,
            PER_HEAD=per_head, CHUNK=min(KTH_CHUNK, power_of_2(size)),
            num_warps=KTH_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return kth
