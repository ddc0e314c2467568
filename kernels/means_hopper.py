"""Gluon: means of key and value blocks on sm_90, for the Hopper kernel to attend to.

The matrix unit sums the tokens of a tile, a product with ones, and three warpgroups of a program take tiles at the same
time, so that a third of the multiprocessors reads at the rate of the memory and there are no more programs than that.
The attention kernel, launched right behind as a dependent, starts on the other multiprocessors at once and waits for
the means when it gets to them. Names as in `attention_hopper`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparse_dit.kernels.copies_hopper import copy_block, seen_as, thread_barrier


@gluon.jit
def _load_tile(d_k, d_v, b_ring, full, number, i_bh, first, batch_heads, heads):
    """Starts the copy of the program's tile of that number into its stage of [STAGES, 1, 1, TILE, D]."""
    STAGES: gl.constexpr = b_ring.shape[0]
    TILE: gl.constexpr = b_ring.shape[3]
    BLOCK_K: gl.constexpr = d_k.block_shape[2]
    barrier, b_x = full.index(number % STAGES), b_ring.index(number % STAGES)
    mbarrier.expect(barrier, TILE * b_ring.shape[4] * b_ring.dtype.primitive_bitwidth // 8)
    i_h, i_b = i_bh % heads, i_bh % batch_heads // heads
    for part in gl.static_range(TILE // BLOCK_K):
        if i_bh < batch_heads:
            copy_block(d_k, i_b, i_h, first + part * BLOCK_K, barrier, b_x, part)
        else:
            copy_block(d_v, i_b, i_h, first + part * BLOCK_K, barrier, b_x, part)


@gluon.jit
def _after(i_bh, first, seq, TILE: gl.constexpr):
    """Head and first token of the tile behind that of i_bh and first."""
    ends = first + TILE >= seq
    return gl.where(ends, i_bh + 1, i_bh), gl.where(ends, 0, first + TILE)


@gluon.jit
def _store_means(b_sum, p_means, first, seq, HEAD_SIZE: gl.constexpr, TILE: gl.constexpr, BLOCK_K: gl.constexpr):
    """Means of the blocks of a tile, from token `first` of a head on, of their sums in the rows of [64, D]."""
    o_part = gl.arange(0, 64, gl.SliceLayout(1, b_sum.type.layout))
    o_dim = gl.arange(0, b_sum.shape[1], gl.SliceLayout(0, b_sum.type.layout))
    tokens = gl.minimum(seq - first - o_part * BLOCK_K, BLOCK_K)
    b_mean = b_sum * gl.expand_dims(1.0 / tokens.to(gl.float32), 1)
    p_rows = p_means + gl.expand_dims((first // BLOCK_K + o_part) * HEAD_SIZE, 1)
    m_mean = gl.expand_dims((o_part < TILE // BLOCK_K) & (tokens > 0), 1) & gl.expand_dims(o_dim < HEAD_SIZE, 0)
    gl.store(p_rows + gl.expand_dims(o_dim, 0), b_mean.to(p_means.dtype.element_ty), mask=m_mean)


@gluon.jit
def _take_means(
    worker: gl.constexpr, d_k, d_v, p_means, rings, fulls, batch_heads, heads, seq, HEAD_SIZE: gl.constexpr
):
    """A warpgroup: tiles in a row, of all heads of k and then of v, through a ring of its own."""
    p_keys, p_values = p_means
    b_ring, full = rings[worker], fulls[worker]
    BLOCK_K: gl.constexpr = d_k.block_shape[2]
    STAGES: gl.constexpr = b_ring.shape[0]
    TILE: gl.constexpr = b_ring.shape[3]
    D: gl.constexpr = b_ring.shape[4]
    dtype: gl.constexpr = d_k.dtype
    tiles = gl.cdiv(seq, TILE)
    share = gl.cdiv(2 * batch_heads * tiles, gl.num_programs(0) * len(rings))
    start = (gl.program_id(0) * len(rings) + worker) * share
    count = gl.minimum(2 * batch_heads * tiles - start, share)  # may be less than none
    ahead_bh, ahead_first = start // tiles, start % tiles * TILE
    for number in range(STAGES):
        if number < count:
            _load_tile(d_k, d_v, b_ring, full, number, ahead_bh, ahead_first, batch_heads, heads)
            ahead_bh, ahead_first = _after(ahead_bh, ahead_first, seq, TILE)
    # Row j is 1 at the tokens of the j-th block of a tile.
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sum_layout, 2)
    o_part = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, operand)), 1)
    o_token = gl.expand_dims(gl.arange(0, TILE, gl.SliceLayout(0, operand)), 0)
    b_ones = (o_part == o_token // BLOCK_K).to(dtype)
    b_zero = gl.zeros([64, D], gl.float32, sum_layout)
    b_before = b_zero
    i_bh, first = start // tiles, start % tiles * TILE
    blocks = gl.cdiv(seq, BLOCK_K)
    for number in range(count + 1):
        # The means of the tile before are stored while the matrix unit sums this one, which is none behind the last.
        mbarrier.wait(full.index(number % STAGES), (number // STAGES) & 1, pred=number < count)
        b_x = seen_as(b_ring.index(number % STAGES), dtype, [TILE, D], gl.NVMMASharedLayout(128, 16, 2))
        b_sum = warpgroup_mma(b_ones, b_x, b_zero, use_acc=False, is_async=True)
        if number > 0:
            p_rows = p_keys
            if i_bh >= batch_heads:
                p_rows = p_values
            p_rows += (i_bh % batch_heads).to(gl.int64) * blocks * HEAD_SIZE
            _store_means(b_before, p_rows, first, seq, HEAD_SIZE, TILE, BLOCK_K)
            i_bh, first = _after(i_bh, first, seq, TILE)
        b_before = warpgroup_mma_wait(0, deps=[b_sum])
        thread_barrier()  # the stage is read
        if number + STAGES < count:
            _load_tile(d_k, d_v, b_ring, full, number + STAGES, ahead_bh, ahead_first, batch_heads, heads)
            ahead_bh, ahead_first = _after(ahead_bh, ahead_first, seq, TILE)


@gluon.jit
def hopper_means_kernel(d_k, d_v, p_keys, p_values, batch_heads, heads, seq, HEAD_SIZE: gl.constexpr, D: gl.constexpr):
    """mean_j = sum_i x_i / n, i over the n tokens of block j of k or of v; means lie [B, H, blocks, head size]."""
    TILE: gl.constexpr = 16384 // D  # tokens of a stage of 32 KB
    STAGES: gl.constexpr = 2
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1
    )
    b_0 = gl.allocate_shared_memory(d_k.dtype, [STAGES, 1, 1, TILE, D], d_k.layout)
    b_1 = gl.allocate_shared_memory(d_k.dtype, [STAGES, 1, 1, TILE, D], d_k.layout)
    b_2 = gl.allocate_shared_memory(d_k.dtype, [STAGES, 1, 1, TILE, D], d_k.layout)
    full_0 = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_1 = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_2 = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full_0.index(stage), count=1)
        mbarrier.init(full_1.index(stage), count=1)
        mbarrier.init(full_2.index(stage), count=1)
    fence_async_shared()
    p_means, rings, fulls = (p_keys, p_values), (b_0, b_1, b_2), (full_0, full_1, full_2)
    gl.warp_specialize(
        [
            (_take_means, (0, d_k, d_v, p_means, rings, fulls, batch_heads, heads, seq, HEAD_SIZE)),
            (_take_means, (1, d_k, d_v, p_means, rings, fulls, batch_heads, heads, seq, HEAD_SIZE)),
            (_take_means, (2, d_k, d_v, p_means, rings, fulls, batch_heads, heads, seq, HEAD_SIZE)),
        ],
        [4, 4],
        [168, 168],
    )
