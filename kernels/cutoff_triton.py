"""Triton: the largest of a pool of many numbers, up to a count or a sum of them, without a sort.

What is taken is a prefix of the pool in falling order, equal numbers by ascending index. Its last value is found digit
by digit, from the highest, in an encoding whose integers ascend as the numbers do (`lists_triton`). A launch finds one
digit: its programs add up, for each value that the digit may have, what lies at or above. Sums are of integers, so that
the order in which programs add does not matter. Names as in `attention`: `i_` program index, `p_` pointer, `o_`
offsets, `m_` mask, `b_` values on chip.
"""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_dit.kernels.launches import cdiv, device_of, launch_kernel, power_of_2
from sparse_dit.kernels.lists_triton import LOWEST, _best, _key, warps_for

# Bits a digit: more of them take fewer launches, and more sums a number.
BITS = 4
# Numbers a program adds up, those of them loaded at once (of shares half as many), and warps a program.
TILE, CHUNK, WARPS = 2048, 512, 4
ONE = tl.constexpr(2**40)  # a share of 1 as an integer: pools of up to 2^22 numbers cannot overflow


@triton.jit
def _shift(i_digit, BITS: tl.constexpr):
    """Bits below a digit; the last digit may be a short one."""
    return tl.maximum(32 - (i_digit + 1) * BITS, 0)


@triton.jit
def _found(p_totals, digits, target, BITS: tl.constexpr):
    """The first digits of the last value that is taken, the others 0, and the total above what these leave open."""
    DIGITS: tl.constexpr = 1 << BITS
    o_digit = tl.arange(0, DIGITS)
    bound = tl.full([], LOWEST, tl.int32)
    above = tl.full([], 0, tl.int64)
    for i_digit in range(digits):
        shift = _shift(i_digit, BITS)
        m_digit = o_digit < (1 << (32 - i_digit * BITS - shift))
        b_total = tl.load(p_totals + i_digit * DIGITS + o_digit, mask=m_digit, other=0)
        # Totals fall as the digit rises: how many reach the target tells the last one that does. 0 always does.
        digit = tl.maximum(tl.sum((m_digit & (b_total >= target)).to(tl.int32), 0) - 1, 0)
        m_next = m_digit & (o_digit == digit + 1)
        above = tl.where(tl.sum(m_next.to(tl.int32), 0) > 0, tl.sum(tl.where(m_next, b_total, 0), 0), above)
        bound += digit << shift
    return bound, above


@triton.jit
def _target(p_totals, p_budget, budget, i_pool, digits, threshold, MASS: tl.constexpr, PER_POOL: tl.constexpr,
            BITS: tl.constexpr):  # fmt: skip
    """What taken numbers must reach: the budget, or what own numbers leave of a share of everything."""
    if MASS:
        own = tl.load(p_totals + digits * (1 << BITS))
        everything = (tl.load(p_totals) + own).to(tl.float64)
        return tl.ceil(everything * threshold - own.to(tl.float64)).to(tl.int64)
    elif PER_POOL:
        return tl.load(p_budget + i_pool).to(tl.int64)
    else:
        return tl.full([], 0, tl.int64) + budget


@triton.jit
def _read(p_scores, p_excluded, p_low, p_high, i_pool, o, m, size, columns, e_pool, e_row, e_column,
          MASS: tl.constexpr, EXCLUDED: tl.constexpr):  # fmt: skip
    """Numbers of a pool by their index: their keys, and whether they are left out."""
    b_score = tl.load(p_scores + i_pool * size + o, mask=m, other=0.0).to(tl.float32)
    if MASS:
        low, high = tl.load(p_low + i_pool), tl.load(p_high + i_pool)
        b_score = tl.where(high > low, tl.div_rn(b_score - low, tl.where(high > low, high - low, 1.0)), 1.0)
    m_out = o < 0
    if EXCLUDED:
        o_out = o // columns * e_row + o % columns * e_column
        m_out = tl.load(p_excluded + i_pool * e_pool + o_out, mask=m, other=0) != 0
    return b_score, m_out


@triton.jit(do_not_specialize=["i_digit"])  # one kernel for all digits
def digit_kernel(
    p_scores,
    p_excluded,
    p_low,
    p_high,
    p_budget,
    p_totals,
    budget,
    threshold,
    size,
    columns,
    e_pool,
    e_row,
    e_column,
    i_digit,
    digits,
    MASS: tl.constexpr,
    EXCLUDED: tl.constexpr,
    PER_POOL: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """totals[i_digit, d] += weights of the numbers of a tile whose keys are at least the digits found and d."""
    DIGITS: tl.constexpr = 1 << BITS
    i_pool = tl.program_id(1).to(tl.int64)
    p_totals += i_pool * (digits * DIGITS + 1)
    bound = tl.full([], LOWEST, tl.int32)
    if i_digit > 0:
        target = _target(p_totals, p_budget, budget, i_pool, digits, threshold, MASS, PER_POOL, BITS)
        bound, _ = _found(p_totals, i_digit, target, BITS)
    o_digit = tl.arange(0, DIGITS)
    shift = _shift(i_digit, BITS)
    m_digit = o_digit < (1 << (32 - i_digit * BITS - shift))
    b_bound = bound + (tl.where(m_digit, o_digit, 0) << shift)
    b_total = tl.zeros([DIGITS, CHUNK], tl.int64 if MASS else tl.int32)  # a thread has its numbers for all digits
    b_own = tl.zeros([CHUNK], tl.int64)
    first = tl.program_id(0) * TILE
    for start in range(first, tl.minimum(first + TILE, size), CHUNK):
        o = start + tl.arange(0, CHUNK)
        m = o < size
        b_score, m_out = _read(
            p_scores, p_excluded, p_low, p_high, i_pool, o, m, size, columns, e_pool, e_row, e_column, MASS, EXCLUDED
        )
        b_key = tl.where(m & (m_out == 0), _key(b_score), LOWEST)
        m_reaches = (b_key[None, :] >= b_bound[:, None]) & (b_key > LOWEST)[None, :]
        if MASS:
            b_weight = (b_score.to(tl.float64) * ONE).to(tl.int64)
            b_total += tl.where(m_reaches, b_weight[None, :], 0)
            b_own += tl.where(m & m_out, b_weight, 0)
        else:
            b_total += m_reaches.to(tl.int32)
    b_sum = tl.sum(b_total, 1).to(tl.int64)
    tl.atomic_add(p_totals + i_digit * DIGITS + o_digit, b_sum, mask=m_digit & (b_sum > 0), sem="relaxed")
    if MASS:
        tl.atomic_add(p_totals + digits * DIGITS, tl.sum(b_own, 0), mask=i_digit == 0, sem="relaxed")


@triton.jit
def _row(
    p_scores, p_excluded, p_low, p_high, p_budget, p_totals, budget, threshold, size, columns, e_pool, e_row, e_column,
    digits, i_row, i_pool, o_column, MASS: tl.constexpr, EXCLUDED: tl.constexpr, PER_POOL: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Numbers of a row, whether they are left out, their keys, LOWEST of those; the last value that is taken, and what
    those equal to it may still add."""
    p_totals += i_pool * (digits * (1 << BITS) + 1)
    target = _target(p_totals, p_budget, budget, i_pool, digits, threshold, MASS, PER_POOL, BITS)
    bound, above = _found(p_totals, digits, target, BITS)
    m = o_column < columns
    b_score, m_out = _read(
        p_scores, p_excluded, p_low, p_high, i_pool, i_row * columns + o_column, m, size, columns, e_pool, e_row,
        e_column, MASS, EXCLUDED,
    )  # fmt: skip
    return b_score, m_out, tl.where(m & (m_out == 0), _key(b_score), LOWEST), bound, target - above


@triton.jit
def ties_kernel(
    p_scores,
    p_excluded,
    p_low,
    p_high,
    p_budget,
    p_totals,
    p_ties,
    budget,
    threshold,
    size,
    columns,
    e_pool,
    e_row,
    e_column,
    digits,
    MASS: tl.constexpr,
    EXCLUDED: tl.constexpr,
    PER_POOL: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """How many numbers of one row equal the last value that is taken."""
    i_row, i_pool = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_column = tl.arange(0, WIDTH)
    _, _, b_key, bound, _ = _row(
        p_scores, p_excluded, p_low, p_high, p_budget, p_totals, budget, threshold, size, columns, e_pool, e_row,
        e_column, digits, i_row, i_pool, o_column, MASS, EXCLUDED, PER_POOL, BITS,
    )  # fmt: skip
    m_equal = (b_key == bound) & (b_key > LOWEST)
    tl.store(p_ties + i_pool * tl.num_programs(0) + i_row, tl.sum(m_equal.to(tl.int32), 0))


@triton.jit
def taken_kernel(
    p_scores,
    p_excluded,
    p_low,
    p_high,
    p_budget,
    p_totals,
    p_ties,
    p_taken,
    budget,
    threshold,
    size,
    columns,
    e_pool,
    e_row,
    e_column,
    digits,
    MASS: tl.constexpr,
    EXCLUDED: tl.constexpr,
    PER_POOL: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Marks what one row takes: by MASS also what is left out of the comparison, else at least the row's best."""
    i_row, i_pool = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b_before = tl.zeros([ROWS], tl.int32)
    for start in range(0, i_row, ROWS):
        o_row = start + tl.arange(0, ROWS)
        b_before += tl.load(p_ties + i_pool * tl.num_programs(0) + o_row, mask=o_row < i_row, other=0)
    o_column = tl.arange(0, WIDTH)
    b_score, m_out, b_key, bound, still = _row(
        p_scores, p_excluded, p_low, p_high, p_budget, p_totals, budget, threshold, size, columns, e_pool, e_row,
        e_column, digits, i_row, i_pool, o_column, MASS, EXCLUDED, PER_POOL, BITS,
    )  # fmt: skip
    m_equal = (b_key == bound) & (b_key > LOWEST)
    b_rank = (tl.cumsum(m_equal.to(tl.int32), 0) - 1 + tl.sum(b_before, 0)).to(tl.int64)
    if MASS:
        b_rank *= (b_score.to(tl.float64) * ONE).to(tl.int64)
    m_taken = (b_key > bound) | (m_equal & (b_rank < still))
    m_taken |= m_out if MASS else _best(b_key, o_column)
    o_taken = (i_pool * tl.num_programs(0) + i_row) * columns + o_column
    tl.store(p_taken + o_taken, m_taken.to(tl.uint8), mask=o_column < columns)


def triton_take_mass(gates: Tensor, own: Tensor, threshold: float) -> Tensor:
    """The contract of `cutoff.take_mass`; shares are rounded to 2^-40 where they are added up."""
    low, high = torch.aminmax(gates.flatten(1), dim=-1)
    return _taken(gates, own, (low, high), threshold=threshold)


def triton_take_count(scores: Tensor, budget: int | Tensor, excluded: Tensor | None) -> Tensor:
    """Marks the `budget` (an int or integers [pools]) largest of each pool, the lower index among equals.

    Args:
        scores: fp32 [pools, rows, columns], not NaN.
        budget: at least 1.
        excluded: bool [pools or 1, rows or 1, columns], what is not taken and does not count.

    Returns:
        bool [pools, rows, columns]. Rows that would go empty take their best.
    """
    return _taken(scores, excluded, (None, None), budget=budget)


def _taken(
    scores: Tensor,
    excluded: Tensor | None,
    ends: tuple[Tensor | None, Tensor | None],
    *,
    budget: int | Tensor = 0,
    threshold: float = 0.0,
) -> Tensor:
    scores = scores.contiguous()
    pools, rows, columns = scores.shape
    digits = -(-32 // BITS)
    totals = torch.zeros(pools, (digits << BITS) + 1, dtype=torch.int64, device=scores.device)
    ties = torch.empty(pools, rows, dtype=torch.int32, device=scores.device)
    taken = torch.empty(pools, rows, columns, dtype=torch.bool, device=scores.device)
    if excluded is not None:
        excluded = excluded.expand(scores.shape).view(torch.uint8)
    strides = (0, 0, 0) if excluded is None else excluded.stride()
    per_pool = isinstance(budget, Tensor)
    inputs = (scores, excluded, *ends, budget if per_pool else None, totals)
    numbers = (0 if per_pool else budget, threshold, rows * columns, columns, *strides)
    fixed = {"MASS": ends[0] is not None, "EXCLUDED": excluded is not None, "PER_POOL": per_pool, "BITS": BITS}
    width, chunk = power_of_2(columns), CHUNK // 2 if fixed["MASS"] else CHUNK
    grid = (cdiv(rows * columns, TILE), pools)
    with device_of(scores):
        for digit in range(digits):
            launch_kernel(
                digit_kernel, grid,
                *inputs, *numbers, digit, digits, **fixed, TILE=TILE, CHUNK=chunk, num_warps=WARPS,
            )  # fmt: skip
        launch_kernel(
            ties_kernel, (rows, pools),
            *inputs, ties, *numbers, digits, **fixed, WIDTH=width, num_warps=warps_for(columns),
        )  # fmt: skip
        launch_kernel(
            taken_kernel, (rows, pools),
            *inputs, ties, taken.view(torch.uint8), *numbers, digits, **fixed, WIDTH=width,
            ROWS=min(1024, power_of_2(rows)), num_warps=warps_for(columns),
        )  # fmt: skip
    return taken
