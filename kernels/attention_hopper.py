"""Gluon: attention along a block list on sm_90, in 16 bits and on quantized codes. The contract of `attention`.

One program computes 128 queries of one head. A producer warp walks the list and has the tensor memory accelerator
(TMA) copy the listed blocks of K and V into a ring of shared memory, 128 keys a stage; two warpgroups of 64 queries
each consume them. The score product of a tile and the value product of the tile before are in flight together, and the
softmax of a tile runs while the latter finishes.

Blocks of fewer than 128 keys fill a stage in PARTS, so that every product is 128 keys wide whatever the list's blocks.
Rows of a head are launched by falling length of their lists, so that the last ones to run are short.

Names as in `attention`; `d_` is a TMA descriptor, `full` and `empty` are barriers, `wg` a consumer warpgroup. Layouts:
scores are [64, 128] as the matrix unit leaves them, and seen as [64, PARTS, keys a part] where parts have scales.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparse_dit.kernels.copies_hopper import next_stage, produce, release, seen_as, stage_of, tma_load
from sparse_dit.kernels.quantize import GROUP
from sparse_dit.kernels.softmax_hopper import (
    add_sums,
    add_total,
    keep_total,
    scales_of_parts,
    softmax,
    softmax_of_parts,
)

SUMMED_TILES = gl.constexpr(16)  # FP8 products that the matrix unit adds up before they go into a total in fp32
SCALE_GROUP = gl.constexpr(GROUP)


@gluon.jit
def _scores(b_q, b_k, stage, CODES: gl.constexpr, zero):
    """Starts q k^T of a stage, [64, TILE]."""
    b_k_rows = seen_as(b_k.index(stage), b_k.dtype, [zero.shape[1], CODES], b_q.layout)
    return warpgroup_mma(b_q, b_k_rows.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _fp8_operand(b_p, layout: gl.constexpr):
    """Weights [64, keys] as the E4M3 operand of the value product.

    Of 16 columns a thread holds {2t, 2t+1, 8+2t, 9+2t} and must hold {4t .. 4t+3}: columns are renamed, and the values
    lie in the same order (`quantize.Quantized`), so that no register moves between threads. Four are packed at once:
    Triton's own conversion takes the bytes apart again.
    """
    KEYS: gl.constexpr = b_p.shape[1]
    b_p = b_p.reshape([64, KEYS // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([64, KEYS])
    return gl.inline_asm_elementwise(
        """
        {
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
        }
        """,
        "=r,f,f,f,f",
        [gl.convert_layout(b_p, layout, assert_trivial=True)],
        gl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _weigh(b_p, b_v, stage, b_acc, PARTS: gl.constexpr, V_LAYOUT: gl.constexpr, dtype: gl.constexpr):
    """Starts acc + p v of a stage, in one product, or in two for FP8 values in two parts."""
    FP8: gl.constexpr = b_v.dtype.primitive_bitwidth == 8
    operand: gl.constexpr = gl.DotOperandLayout(0, b_acc.type.layout, 4 if FP8 else 2)
    TILE_K: gl.constexpr = b_p.shape[1]
    D: gl.constexpr = b_acc.shape[1]
    if not FP8:
        b_v_rows = seen_as(b_v.index(stage), b_v.dtype, [TILE_K, D], V_LAYOUT)
        return warpgroup_mma(gl.convert_layout(b_p.to(dtype), operand), b_v_rows, b_acc, is_async=True)
    elif PARTS == 1:
        b_v_rows = b_v.index(stage).reshape([D, TILE_K]).permute((1, 0))
        return warpgroup_mma(_fp8_operand(b_p, operand), b_v_rows, b_acc, is_async=True)
    else:
        b_left, b_right = gl.split(b_p.reshape([64, 2, TILE_K // 2]).permute((0, 2, 1)))
        b_v_left = b_v.index(stage * 2).reshape([D, TILE_K // 2]).permute((1, 0))
        b_v_right = b_v.index(stage * 2 + 1).reshape([D, TILE_K // 2]).permute((1, 0))
        b_acc = warpgroup_mma(_fp8_operand(b_left, operand), b_v_left, b_acc, is_async=True)
        return warpgroup_mma(_fp8_operand(b_right, operand), b_v_right, b_acc, is_async=True)


@gluon.jit
def _start_tile(
    i_tile, place, former, tiles, rings, turns, b_q, b_p, b_acc, zero, wg: gl.constexpr, PARTS: gl.constexpr
):
    """Starts the products of a tile, q k^T of its own and p v of the one before; returns q k^T, and p v on its way.

    Their stages and phases are `place` and `former`. The keys are read then, but their stage is not let go.
    """
    _, b_k, b_v, b_out, _ = tiles
    _, _, _, v_full, _ = rings
    QUANTIZED: gl.constexpr = b_k.dtype.primitive_bitwidth == 8
    VALUE_PRODUCTS: gl.constexpr = PARTS if b_v.dtype.primitive_bitwidth == 8 else 1
    v_layout: gl.constexpr = b_out.layout
    dtype: gl.constexpr = b_out.dtype
    stage, _ = place
    before, phase = former
    if not QUANTIZED:
        mbarrier.wait(turns.index(wg), (i_tile - 1) & 1)
    b_s = _scores(b_q, b_k, stage, b_q.shape[1], zero)
    mbarrier.wait(v_full.index(before), phase)
    b_p = gl.convert_layout(b_p.reshape([64, zero.shape[1]]), zero.type.layout, assert_trivial=True)
    b_acc = _weigh(b_p, b_v, before, b_acc, PARTS, v_layout, dtype)
    if not QUANTIZED:
        release(turns.index(1 - wg))
    return warpgroup_mma_wait(VALUE_PRODUCTS, deps=[b_s]), b_acc


@gluon.jit
def _end_tile(i_tile, total, former, following, rings, b_acc, b_decay):
    """Waits for the keys of the following tile and for p v of the former one, and returns it decayed."""
    _, k_full, _, _, v_empty = rings
    # Waiting for the next keys before the value product keeps the assembler from moving that wait up in front of
    # the softmax, which would then overlap with nothing.
    stage, phase = following
    mbarrier.wait(k_full.index(stage), phase, pred=i_tile + 1 < total)
    b_acc = warpgroup_mma_wait(0, deps=[b_acc])
    release(v_empty.index(former[0]))
    return b_acc * gl.convert_layout(gl.expand_dims(b_decay, 1), b_acc.type.layout)


@gluon.jit
def _attend(
    tiles, b_biases, rings, turns, lists, scales, rows, ends, wg: gl.constexpr, PARTS: gl.constexpr,
    ORDERED: gl.constexpr, SUMMARY: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 queries over all tiles of the list, the last tile first, the only one that needs a mask.

    Then, where blocks are skipped, over the tiles of all means, whose scores `b_biases` are added to: in the same loop,
    for beside a second one the first is slower, even where its machine code stays the same.
    """
    b_queries, b_k, b_v, b_out, b_totals = tiles
    q_full, k_full, k_empty, v_full, _ = rings
    p_indices, i_index, blocks, means, valid = lists
    p_q_scale, p_k_scale, p_v_lift, scale = scales
    first_row, seq_q = rows
    STAGES: gl.constexpr = b_k.shape[0]
    TILE_K: gl.constexpr = b_k.shape[3]
    D: gl.constexpr = b_out.shape[2]
    CODES: gl.constexpr = b_queries.shape[4]
    QUANTIZED: gl.constexpr = b_k.dtype.primitive_bitwidth == 8
    FP8: gl.constexpr = b_v.dtype.primitive_bitwidth == 8
    dtype: gl.constexpr = b_out.dtype
    PER_GROUP: gl.constexpr = SCALE_GROUP // (TILE_K // PARTS)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 32 if QUANTIZED else 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if FP8 else 16])
    v_layout: gl.constexpr = b_out.layout

    b_zero_s = gl.zeros([64, TILE_K], gl.int32 if QUANTIZED else gl.float32, s_layout)
    b_parts = b_zero_s.reshape([64, PARTS, TILE_K // PARTS])
    part_layout: gl.constexpr = gl.SliceLayout(2, b_parts.type.layout)
    row_layout: gl.constexpr = gl.SliceLayout(1, part_layout if QUANTIZED else s_layout)
    b_acc = gl.zeros([64, D], gl.float32, acc_layout)
    b_max = gl.full([64], -float("inf"), gl.float32, row_layout)
    if FP8:
        b_total = b_totals.index(wg)
        b_total_max = b_max
        keep_total(b_total, b_acc)
    o_row = first_row + wg * 64 + gl.arange(0, 64, row_layout)
    o_part = gl.arange(0, PARTS, gl.SliceLayout(0, part_layout))
    count = gl.cdiv(blocks, PARTS)
    total = count + means

    b_q = b_queries.index(wg).reshape([64, CODES])
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    b_first = _scores(b_q, b_k, 0, CODES, b_zero_s)
    if QUANTIZED:
        b_q_scale = gl.load(p_q_scale + o_row, mask=o_row < seq_q, other=0.0)
        b_factor, b_lift = scales_of_parts(
            p_k_scale, p_v_lift, p_indices, i_index, blocks, (count - 1) * PARTS + o_part, b_q_scale,
            PER_GROUP, FP8,
        )  # fmt: skip
    b_first = warpgroup_mma_wait(0, deps=[b_first])
    mbarrier.arrive(k_empty.index(0), count=1)
    o_key = gl.arange(0, TILE_K, gl.SliceLayout(0, s_layout))
    b_first = gl.where(gl.expand_dims(o_key < valid, 0), b_first.to(gl.float32), -float("inf"))
    if QUANTIZED:
        b_first = b_first.reshape([64, PARTS, TILE_K // PARTS])
        b_p, b_max, b_decay, b_sum = softmax_of_parts(b_first, b_max, b_factor, b_lift)
        b_factor, b_lift = scales_of_parts(
            p_k_scale, p_v_lift, p_indices, i_index, blocks, (count - 2) * PARTS + o_part, b_q_scale,
            PER_GROUP, FP8,
        )  # fmt: skip
    else:
        b_p, b_max, b_decay, b_sum = softmax(b_first, b_max, scale)
    mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES & 1, pred=total > 1)
    if SUMMARY:
        b_starts = seen_as(b_biases, gl.float32, [STAGES + 1, TILE_K], b_biases.layout)
    former, place = stage_of(0, STAGES), stage_of(1, STAGES)
    for i_tile in range(1, total):
        if QUANTIZED:  # counted: i % 3 and i // 3 take ten instructions in a row, which 16 bits hide
            following = next_stage(place, STAGES)
        else:
            place, former = stage_of(i_tile, STAGES), stage_of(i_tile - 1, STAGES)
        b_s, b_acc = _start_tile(i_tile, place, former, tiles, rings, turns, b_q, b_p, b_acc, b_zero_s, wg, PARTS)
        if SUMMARY:  # noqa: SIM102 - a constant by itself: without it the rest is not compiled
            if i_tile >= count:
                b_s += gl.expand_dims(b_starts.index(i_tile % (STAGES + 1)).load(gl.SliceLayout(0, s_layout)), 0)
        release(k_empty.index(place[0]))  # the producer goes by it for `b_biases`, too
        if QUANTIZED:
            b_s = b_s.reshape([64, PARTS, TILE_K // PARTS])
            b_p, b_max, b_decay, b_sums = softmax_of_parts(b_s, b_max, b_factor, b_lift)
            b_factor, b_lift = scales_of_parts(
                p_k_scale, p_v_lift, p_indices, i_index, blocks, (count - 2 - i_tile) * PARTS + o_part,
                b_q_scale, PER_GROUP, FP8,
            )  # fmt: skip
        else:
            b_p, b_max, b_decay, b_sums = softmax(b_s, b_max, scale)
        b_sum = add_sums(b_sum, b_decay, b_sums)
        if not QUANTIZED:
            following = stage_of(i_tile + 1, STAGES)
        b_acc = _end_tile(i_tile, total, former, following, rings, b_acc, b_decay)
        former, place = place, following
        if FP8:  # noqa: SIM102 - a constant by itself: without it the rest is not compiled
            if i_tile % SUMMED_TILES == 0:
                b_acc = add_total(b_total, b_acc, b_total_max, b_max)
                keep_total(b_total, b_acc)
                b_total_max = b_max
                b_acc = gl.zeros([64, D], gl.float32, acc_layout)
    last, phase = former if QUANTIZED else stage_of(total - 1, STAGES)
    mbarrier.wait(v_full.index(last), phase)
    b_p = gl.convert_layout(b_p.reshape([64, TILE_K]), s_layout, assert_trivial=True)
    b_acc = warpgroup_mma_wait(0, deps=[_weigh(b_p, b_v, last, b_acc, PARTS, v_layout, dtype)])

    if FP8:
        b_acc = add_total(b_total, b_acc, b_total_max, b_max)
    # Kernel arguments as they came, and rows behind a fence: what follows is computed here and not kept in registers,
    # let alone spilled, from before the loop to here.
    first_row = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [first_row], gl.int32, is_pure=False, pack=1)
    o_row = first_row + wg * 64 + gl.arange(0, 64, row_layout)
    (
        p_out,
        out_batch,
        out_head,
        out_token,
        p_lse,
        p_lse_shift,
        p_v_mean,
        p_v_scale_top,
        p_order,
        order_head,
        heads,
        head_size,
    ) = ends
    i_bh = gl.program_id(0) // gl.cdiv(seq_q, 128)
    far_b, far_h, far_bh = (i_bh // heads).to(gl.int64), (i_bh % heads).to(gl.int64), i_bh.to(gl.int64)
    LN_2: gl.constexpr = 0.6931471805599453
    b_sum = gl.convert_layout(gl.sum(b_sum, 1), row_layout)
    b_lse = (b_max + gl.log2(b_sum)) * LN_2
    if FP8:
        b_sum = b_sum * (256.0 / gl.load(p_v_scale_top + far_bh))
    b_result = b_acc / gl.convert_layout(gl.expand_dims(b_sum, 1), acc_layout)
    if FP8:
        o_mean = gl.arange(0, D, gl.SliceLayout(0, acc_layout))
        p_mean = p_v_mean + far_bh * head_size
        b_result += gl.expand_dims(gl.load(p_mean + o_mean, mask=o_mean < head_size, other=0.0), 0)
    if QUANTIZED:
        b_lse += gl.load(p_lse_shift + far_bh * seq_q + o_row, mask=o_row < seq_q, other=0.0)
    if ORDERED:
        p_order += far_h * order_head
    gl.store(p_lse + far_bh * seq_q + _tokens(p_order, o_row, seq_q, ORDERED), b_lse, mask=o_row < seq_q)
    # Through shared memory, so that rows are stored in pieces of 16 bytes, each to its token.
    b_out.index(wg).store(b_result.to(dtype))
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    b_rows = b_out.index(wg).load(store_layout)
    o_row = first_row + wg * 64 + gl.arange(0, 64, gl.SliceLayout(1, store_layout))
    o_token = _tokens(p_order, o_row, seq_q, ORDERED)
    o_dim = gl.arange(0, D, gl.SliceLayout(0, store_layout))
    p_rows = p_out + far_b * out_batch + far_h * out_head + gl.expand_dims(o_token.to(gl.int64) * out_token, 1)
    m_rows = gl.expand_dims(o_row < seq_q, 1) & gl.expand_dims(o_dim < head_size, 0)
    gl.store(p_rows + gl.expand_dims(o_dim, 0), b_rows, mask=m_rows)


@gluon.jit
def _tokens(p_order, o_row, seq_q, ORDERED: gl.constexpr):
    if ORDERED:
        return gl.load(p_order + o_row, mask=o_row < seq_q, other=0)
    else:
        return o_row.to(gl.int64)


@gluon.jit
def hopper_forward_kernel(
    d_q, d_k, d_v, d_keys, d_values,
    p_q_scale, p_lse_shift, p_k_scale, p_v_lift, p_v_scale_top, p_v_mean, p_order, p_out, p_lse,
    p_indices, p_counts, p_rows, order_head, out_batch, out_head, out_token,
    i_batch, i_head, i_row, i_index, c_batch, c_head, c_row, r_batch, r_head,
    heads, query_blocks, seq_q, seq_k, groups, head_size, scale,
    ORDERED: gl.constexpr, TURNS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out_i = sum_j 2^(s_ij - l_i) v_j, l_i = log2 sum_j 2^s_ij, j over the listed blocks.

    s = q.k scale log2(e) in 16 bits; on codes it is told by `quantize.Quantized`. With the means of key blocks and of
    value blocks, in 16 bits, j also over the blocks that are not listed: s = q.mean scale log2(e) + log2 n of n tokens.
    TURNS: rows take tiles of means in orders of their own.
    """
    program = gl.program_id(0)
    i_bh = program // query_blocks
    i_h, i_b = i_bh % heads, i_bh // heads
    BLOCK_K: gl.constexpr = d_v.block_shape[3] if d_v.dtype.primitive_bitwidth == 8 else d_v.block_shape[2]
    TILE_K: gl.constexpr = 128
    PARTS: gl.constexpr = TILE_K // BLOCK_K
    QUANTIZED: gl.constexpr = d_q.dtype.primitive_bitwidth == 8
    FP8: gl.constexpr = d_v.dtype.primitive_bitwidth == 8
    CODES: gl.constexpr = d_q.block_shape[3]
    dtype: gl.constexpr = p_out.dtype.element_ty
    SUMMARY: gl.constexpr = d_keys is not None

    far_h, far_b, far_bh = i_h.to(gl.int64), i_b.to(gl.int64), i_bh.to(gl.int64)
    i_block = gl.load(p_rows + far_b * r_batch + far_h * r_head + program % query_blocks)
    first_row = i_block * 128
    blocks = gl.load(p_counts + far_b * c_batch + far_h * c_head + i_block * c_row)
    p_indices += far_b * i_batch + far_h * i_head + i_block.to(gl.int64) * i_row
    if QUANTIZED:
        p_q_scale += far_bh * seq_q
        p_k_scale += far_bh * groups
    if FP8:
        p_v_lift += far_bh * groups
    # Keys of the first tile, the one at the list's end: the list may not fill it, and its last block may be ragged.
    last_block = gl.load(p_indices + (blocks - 1) * i_index)
    valid = (blocks - 1) % PARTS * BLOCK_K + gl.minimum(seq_k - last_block * BLOCK_K, BLOCK_K)
    means, key_blocks, log_whole, log_last = 0, 0, 0.0, 0.0
    if SUMMARY:  # tiles of means, and what is added to their scores: log2 of tokens
        key_blocks = gl.cdiv(seq_k, BLOCK_K)
        means = gl.where(blocks < key_blocks, gl.cdiv(key_blocks, TILE_K), 0)
        log_whole = gl.log2(BLOCK_K * 1.0) / scale
        log_last = gl.log2((seq_k - (key_blocks - 1) * BLOCK_K).to(gl.float32)) / scale

    b_q = gl.allocate_shared_memory(d_q.dtype, [2, 1, 1, 64, CODES], d_q.layout)
    b_k = gl.allocate_shared_memory(d_k.dtype, [STAGES, 1, 1, TILE_K, CODES], d_q.layout)
    out_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    if QUANTIZED:
        b_out = gl.allocate_shared_memory(dtype, [2, 64, D], out_layout)
    else:
        b_out = seen_as(b_q, dtype, [2, 64, D], out_layout)
    if FP8:
        b_v = gl.allocate_shared_memory(d_v.dtype, [STAGES * PARTS, 1, 1, D, BLOCK_K], d_v.layout)
        total_layout: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [2, 1, 0])
        b_totals = gl.allocate_shared_memory(gl.float32, [2, D // 8, 128, 4], total_layout)
    else:
        b_totals = b_out
        b_v = gl.allocate_shared_memory(d_v.dtype, [STAGES, 1, 1, TILE_K, D], d_v.layout)
    if SUMMARY:  # one tile more than stages: a tile's are written while all stages are still read
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        b_biases = gl.allocate_shared_memory(gl.float32, [(STAGES + 1) * TILE_K // 32, 32], plain)
    else:
        b_biases = b_totals
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    for wg in gl.static_range(2):
        mbarrier.init(turns.index(wg), count=1)
    mbarrier.arrive(turns.index(0), count=1)
    fence_async_shared()
    mbarrier.expect(q_full, 2 * 64 * CODES * d_q.dtype.primitive_bitwidth // 8)
    for wg in gl.static_range(2):
        tma_load(d_q, [i_b, i_h, first_row + wg * 64, 0], q_full, b_q.index(wg))

    tiles = (b_q, b_k, b_v, b_out, b_totals)
    rings = (q_full, k_full, k_empty, v_full, v_empty)
    lists = (p_indices, i_index, blocks, means, valid)
    scales = (p_q_scale, p_k_scale, p_v_lift, scale)
    rows = (first_row, seq_q)
    ends = (
        p_out, out_batch, out_head, out_token, p_lse, p_lse_shift, p_v_mean, p_v_scale_top, p_order, order_head, heads,
        head_size,
    )  # fmt: skip
    copied = (d_k, d_v, b_k, b_v)
    summaries = (d_keys, d_values, b_biases, key_blocks, log_whole, log_last)
    gl.warp_specialize(
        [
            (_attend, (tiles, b_biases, rings, turns, lists, scales, rows, ends, 0, PARTS, ORDERED, SUMMARY)),
            (_attend, (tiles, b_biases, rings, turns, lists, scales, rows, ends, 1, PARTS, ORDERED, SUMMARY)),
            (produce, (copied, summaries, rings, lists, (i_b, i_h, i_block), PARTS, SUMMARY, TURNS)),
        ],
        [4, 1],
        [240, 24],
    )
