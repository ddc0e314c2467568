"""Gluon: the producer of the Hopper kernel, which copies tiles of K and V into a ring of shared memory.

Names as in `attention_hopper`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.6 has other names than its successors for these.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@builtin
def seen_as(memory, dtype, shape, layout, _semantic=None):
    """The same bytes of shared memory in another shape."""
    dtype, layout = (getattr(value, "value", value) for value in (dtype, layout))
    return _semantic.memdesc_reinterpret(memory, dtype, [getattr(size, "value", size) for size in shape], layout)


@gluon.jit
def copy_block(d_x, i_b, i_h, start, full, b_x, part):
    """One block of 16-bit rows, or of codes, into its part of a stage [1, 1, TILE, columns], a panel at a time."""
    BLOCK_K: gl.constexpr = d_x.block_shape[2]
    WIDTH: gl.constexpr = d_x.block_shape[3]
    PANELS: gl.constexpr = b_x.shape[3] // WIDTH
    panels = seen_as(b_x, b_x.dtype, [PANELS, 1, 1, b_x.shape[2], WIDTH], d_x.layout)
    for panel in gl.static_range(PANELS):
        b_part = panels.index(panel).slice(part * BLOCK_K, BLOCK_K, 2)
        tma_load(d_x, [i_b, i_h, start, panel * WIDTH], full, b_part)


@gluon.jit
def produce(tiles, summaries, rings, lists, row, PARTS: gl.constexpr, SUMMARY: gl.constexpr):
    """The producer: all tiles of a program in the order in which they are consumed."""
    _, _, b_k, _ = tiles
    _, _, blocks, _, _ = lists
    count = gl.cdiv(blocks, PARTS)
    if SUMMARY:
        # What the list leaves out of the first tile of means is found while the first tiles of the list are read.
        begun = gl.minimum(count, b_k.shape[0])
        load_tiles(tiles, rings, lists, row, 0, begun, PARTS)
        found = first_means(lists, row, b_k.shape[3])
        load_tiles(tiles, rings, lists, row, begun, count, PARTS)
        load_means(summaries, tiles, rings, lists, row, found, PARTS)
    else:
        load_tiles(tiles, rings, lists, row, 0, count, PARTS)


@gluon.jit
def load_tiles(tiles, rings, lists, row, begin, end, PARTS: gl.constexpr):
    """Copies the listed blocks of some tiles, the last ones first, as stages become free."""
    d_k, d_v, b_k, b_v = tiles
    _, k_full, k_empty, v_full, v_empty = rings
    p_indices, i_index, blocks, _, _ = lists
    i_b, i_h, _ = row
    STAGES: gl.constexpr = b_k.shape[0]
    BLOCK_K: gl.constexpr = d_k.block_shape[2]
    K_BYTES: gl.constexpr = b_k.shape[3] * b_k.shape[4] * b_k.dtype.primitive_bitwidth // 8
    V_BYTES: gl.constexpr = b_v.numel // STAGES * b_v.dtype.primitive_bitwidth // 8
    FP8: gl.constexpr = b_v.dtype.primitive_bitwidth == 8
    count = gl.cdiv(blocks, PARTS)
    for i_tile in range(begin, end):
        stage = i_tile % STAGES
        phase = (i_tile // STAGES) & 1
        first = (count - 1 - i_tile) * PARTS
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), K_BYTES)
        for part in gl.static_range(PARTS):
            # A stage that the list does not fill takes its last block again; those scores are masked.
            start = gl.load(p_indices + gl.minimum(first + part, blocks - 1) * i_index) * BLOCK_K
            copy_block(d_k, i_b, i_h, start, k_full.index(stage), b_k.index(stage), part)
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), V_BYTES)
        for part in gl.static_range(PARTS):
            start = gl.load(p_indices + gl.minimum(first + part, blocks - 1) * i_index) * BLOCK_K
            if FP8:
                b_part = b_v.index(stage * PARTS + part)
                tma_load(d_v, [i_b, i_h, 0, start], v_full.index(stage), b_part)
            else:
                copy_block(d_v, i_b, i_h, start, v_full.index(stage), b_v.index(stage), part)


@gluon.jit
def first_means(lists, row, TILE: gl.constexpr):
    """Block, place and `_listed` of the tile of means that a row starts at.

    Rows take turns: all multiprocessors at the same tile would wait for the same lines of L2.
    """
    p_indices, i_index, blocks, means, _ = lists
    _, _, i_block = row
    first = i_block % gl.maximum(means, 1) * TILE
    place = _first_from(first, p_indices, i_index, blocks)
    b_listed, place = _listed(first, place, p_indices, i_index, blocks, TILE)
    return first, place, b_listed


@gluon.jit
def load_means(summaries, tiles, rings, lists, row, found, PARTS: gl.constexpr):
    """Goes on with the means of all blocks, TILE a stage, and what is added to the scores of each.

    What the list leaves out of a tile is found while the stage before is still read; `found` is of the first one.
    Means of a kernel that may still run (programmatic dependent launch): from here on it is waited for.
    """
    d_keys, d_values, b_biases, seq_k, scale = summaries
    d_k, _, b_k, b_v = tiles
    _, k_full, k_empty, v_full, v_empty = rings
    p_indices, i_index, blocks, means, _ = lists
    i_b, i_h, _ = row
    first, place, b_listed = found
    STAGES: gl.constexpr = b_k.shape[0]
    TILE_K: gl.constexpr = b_k.shape[3]
    WORDS: gl.constexpr = TILE_K // 32
    BYTES: gl.constexpr = TILE_K * b_k.shape[4] * b_k.dtype.primitive_bitwidth // 8
    count = gl.cdiv(blocks, PARTS)
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)
    BLOCK_K: gl.constexpr = d_k.block_shape[2]
    key_blocks = gl.cdiv(seq_k, BLOCK_K)
    log_whole = gl.log2(BLOCK_K * 1.0) / scale
    log_last = gl.log2((seq_k - (key_blocks - 1) * BLOCK_K).to(gl.float32)) / scale
    o_lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    # A number that the compiler does not see, for a loop that stays one: the producer has few registers.
    words = gl.inline_asm_elementwise("mov.b32 $0, 4;", "=r", [], gl.int32, is_pure=False, pack=1)
    for i_tile in range(count, count + means):
        stage = i_tile % STAGES
        phase = (i_tile // STAGES) & 1
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        for word in range(words):
            o_block = first + word * 32 + o_lane
            m_skipped = (((b_listed >> word) & 1) == 0) & (o_block < key_blocks)
            b_bias = gl.where(o_block == key_blocks - 1, log_last, log_whole)
            b_biases.index(stage * WORDS + word).store(gl.where(m_skipped, b_bias, -float("inf")))
        thread_barrier()
        mbarrier.expect(k_full.index(stage), BYTES)
        copy_block(d_keys, i_b, i_h, first, k_full.index(stage), b_k.index(stage), 0)
        thread_barrier()  # or else the assembler looks up what comes next before it copies
        after = first + TILE_K
        if after >= key_blocks:
            after = 0
            place = 0
        b_listed, place = _listed(after, place, p_indices, i_index, blocks, TILE_K)
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), BYTES)
        copy_block(d_values, i_b, i_h, first, v_full.index(stage), b_v.index(stage), 0)
        first = after


@gluon.jit
def _listed(first, place, p_indices, i_index, blocks, TILE: gl.constexpr):
    """Which blocks of a tile are listed: bit w of lane l is block first + 32 w + l; and the place behind them."""
    # A number that the compiler does not see, for a loop that stays one: the producer has few registers.
    words = gl.inline_asm_elementwise("mov.b32 $0, 4;", "=r", [], gl.int32, is_pure=False, pack=1)
    o_lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    b_listed = gl.zeros_like(o_lane)
    for word in range(words):
        m_entry = place + o_lane < blocks
        b_bit = gl.load(p_indices + (place + o_lane) * i_index, mask=m_entry, other=1 << 30) - (first + word * 32)
        m_here = b_bit < 32  # the list ascends: what lies before these blocks lies before `place`
        bits = gl.sum(gl.where(m_here, 1 << b_bit, 0), 0)
        b_listed |= ((bits >> o_lane) & 1) << word
        place += gl.sum(m_here.to(gl.int32), 0)
    return b_listed, place


@gluon.jit
def _first_from(block, p_indices, i_index, blocks):
    """The place of the first entry of a list that is no less than a block, found among 32 at a time."""
    o_lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    place = 0
    left = blocks
    while left > 0:
        step = gl.cdiv(left, 32)
        b_entry = gl.load(p_indices + (place + o_lane * step) * i_index, mask=o_lane * step < left, other=1 << 30)
        less = gl.sum((b_entry < block).to(gl.int32), 0)
        passed = gl.where(less > 0, (less - 1) * step + 1, 0)  # all up to the last that is less
        place += passed
        left = gl.where(less > 0, gl.minimum(step - 1, left - passed), 0)
    return place
