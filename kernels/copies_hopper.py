"""Gluon: the ring of shared memory of the Hopper kernel, and its producer, which copies tiles of K and V into it.

Names as in `attention_hopper`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.6 has other names than its successors for these.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
MEANS_IN_ORDER = gl.constexpr(2)  # tiles of means up to which all rows take them in the same order


@builtin
def seen_as(memory, dtype, shape, layout, _semantic=None):
    """The same bytes of shared memory in another shape."""
    dtype, layout = (getattr(value, "value", value) for value in (dtype, layout))
    return _semantic.memdesc_reinterpret(memory, dtype, [getattr(size, "value", size) for size in shape], layout)


@gluon.jit
def release(barrier):
    """Arrives at a barrier of shared memory once all warps of the consumer are here.

    `mbarrier.arrive` does too, but the compiler then has the warps wait for one another once more behind it.
    """
    thread_barrier()
    mbarrier.expect(barrier, 0)


@gluon.jit
def stage_of(i_tile, STAGES: gl.constexpr):
    """The stage of a tile, and its phase."""
    return i_tile % STAGES, (i_tile // STAGES) & 1


@gluon.jit
def next_stage(place, STAGES: gl.constexpr):
    """The same of the tile behind a `stage_of`."""
    stage, phase = place
    is_last = stage == STAGES - 1
    return gl.where(is_last, 0, stage + 1), gl.where(is_last, phase ^ 1, phase)


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
def produce(tiles, summaries, rings, lists, row, PARTS: gl.constexpr, SUMMARY: gl.constexpr, TURNS: gl.constexpr):
    """The producer: all tiles of a program in the order in which they are consumed."""
    load_tiles(tiles, rings, lists, row, PARTS)
    if SUMMARY:
        load_means(summaries, tiles, rings, lists, row, PARTS, TURNS)


@gluon.jit
def load_tiles(tiles, rings, lists, row, PARTS: gl.constexpr):
    """Copies the listed blocks, the last ones first, as stages become free."""
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
    for i_tile in range(count):
        stage, phase = stage_of(i_tile, STAGES)
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
def load_means(summaries, tiles, rings, lists, row, PARTS: gl.constexpr, TURNS: gl.constexpr):
    """Goes on with the means of all blocks, TILE a stage, and what is added to the scores of each.

    With TURNS rows start at different tiles of means: all multiprocessors at the same one would wait for the same lines
    of L2. Where tiles are few, finding the first one costs more than that.
    Means of a kernel that may still run (programmatic dependent launch): from here on it is waited for.
    """
    p_indices, i_index, blocks, means, _ = lists
    i_b, i_h, i_block = row
    TILE_K: gl.constexpr = tiles[2].shape[3]
    count = gl.cdiv(blocks, PARTS)
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)
    o_lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    # One block a thread at a time, and a number that the compiler does not see: the producer has few registers.
    words = gl.inline_asm_elementwise("mov.b32 $0, 4;", "=r", [], gl.int32, is_pure=False, pack=1)
    given = (summaries, tiles, rings, lists, i_b, i_h)
    place = 0  # in the list, of its first entry that is still to come
    if TURNS:
        i_mean = 0
        if means > MEANS_IN_ORDER:
            i_mean = i_block % means
            place = _first_from(i_mean * TILE_K, p_indices, i_index, blocks)
        for i_tile in range(count, count + means):
            place = _load_tile_of_means(i_mean, i_tile, place, o_lane, words, given)
            i_mean += 1
            if i_mean == means:
                i_mean = 0
                place = 0
    else:
        for i_mean in range(means):
            place = _load_tile_of_means(i_mean, count + i_mean, place, o_lane, words, given)


@gluon.jit
def _load_tile_of_means(i_mean, i_tile, place, o_lane, words, given):
    """One tile of means as the tile `i_tile` of the program; returns where the list goes on."""
    summaries, tiles, rings, lists, i_b, i_h = given
    d_keys, d_values, b_biases, key_blocks, log_whole, log_last = summaries
    _, _, b_k, b_v = tiles
    _, k_full, k_empty, v_full, v_empty = rings
    p_indices, i_index, blocks, _, _ = lists
    STAGES: gl.constexpr = b_k.shape[0]
    TILE_K: gl.constexpr = b_k.shape[3]
    BYTES: gl.constexpr = TILE_K * b_k.shape[4] * b_k.dtype.primitive_bitwidth // 8
    stage, phase = stage_of(i_tile, STAGES)
    for word in range(words):
        first = i_mean * TILE_K + word * 32
        b_entry = gl.load(p_indices + (place + o_lane) * i_index, mask=place + o_lane < blocks, other=1 << 30)
        m_here = b_entry < first + 32  # the list ascends: what lies before `first` lies before `place`
        listed = gl.sum(gl.where(m_here, 1 << (b_entry - first), 0), 0)
        place += gl.sum(m_here.to(gl.int32), 0)
        m_skipped = (((listed >> o_lane) & 1) == 0) & (first + o_lane < key_blocks)
        b_bias = gl.where(first + o_lane == key_blocks - 1, log_last, log_whole)
        # The last tile that had this place let its keys go: the tile before this one has waited for that.
        b_biases.index(i_tile % (STAGES + 1) * (TILE_K // 32) + word).store(gl.where(m_skipped, b_bias, -float("inf")))
    thread_barrier()
    mbarrier.wait(k_empty.index(stage), phase ^ 1)
    mbarrier.expect(k_full.index(stage), BYTES)
    copy_block(d_keys, i_b, i_h, i_mean * TILE_K, k_full.index(stage), b_k.index(stage), 0)
    mbarrier.wait(v_empty.index(stage), phase ^ 1)
    mbarrier.expect(v_full.index(stage), BYTES)
    copy_block(d_values, i_b, i_h, i_mean * TILE_K, v_full.index(stage), b_v.index(stage), 0)
    return place


@gluon.jit
def _first_from(block, p_indices, i_index, blocks):
    """The place of the first entry of a list that is no less than a block, by bisection."""
    low = 0
    high = blocks
    while low < high:
        middle = (low + high) // 2
        if gl.load(p_indices + middle * i_index) < block:
            low = middle + 1
        else:
            high = middle
    return low
