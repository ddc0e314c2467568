"""Gluon: means of key and value blocks on sm_90, for the Hopper kernel to attend to.

The matrix unit sums the tokens of a tile, a product with ones, so that a third of the multiprocessors reads at the rate
of the memory and there are no more programs than that. The attention kernel, launched right behind as a dependent,
starts on the other multiprocessors at once and waits for the means when it gets to them. Names as in
`attention_hopper`.
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
def _load_tile(d_k, d_v, b_x, full, i_tile, tiles, half, heads):
    """Starts the copy of a tile into a stage [1, 1, TILE, D]; the first half of all tiles is of k, the other of v."""
    BLOCK_K: gl.constexpr = d_k.block_shape[2]
    TILE: gl.constexpr = b_x.shape[2]
    mbarrier.expect(full, TILE * b_x.shape[3] * b_x.dtype.primitive_bitwidth // 8)
    i_bh = i_tile % half // tiles
    for part in gl.static_range(TILE // BLOCK_K):
        start = i_tile % tiles * TILE + part * BLOCK_K
        if i_tile < half:
            copy_block(d_k, i_bh // heads, i_bh % heads, start, full, b_x, part)
        else:
            copy_block(d_v, i_bh // heads, i_bh % heads, start, full, b_x, part)


@gluon.jit
def _store_means(b_sum, p_means, i_bh, first, seq, head_size, TILE: gl.constexpr, BLOCK_K: gl.constexpr):
    """Means of the blocks of a tile of one head, from token `first` on, of their sums in the rows of [64, D]."""
    o_part = gl.arange(0, 64, gl.SliceLayout(1, b_sum.type.layout))
    o_dim = gl.arange(0, b_sum.shape[1], gl.SliceLayout(0, b_sum.type.layout))
    o_block = first // BLOCK_K + o_part
    tokens = gl.minimum(seq - o_block * BLOCK_K, BLOCK_K)
    b_mean = b_sum * gl.expand_dims(1.0 / tokens.to(gl.float32), 1)
    o_mean = gl.expand_dims((i_bh * gl.cdiv(seq, BLOCK_K) + o_block) * head_size, 1) + gl.expand_dims(o_dim, 0)
    m_mean = gl.expand_dims((o_part < TILE // BLOCK_K) & (tokens > 0), 1) & gl.expand_dims(o_dim < head_size, 0)
    gl.store(p_means + o_mean, b_mean.to(p_means.dtype.element_ty), mask=m_mean)


@gluon.jit
def hopper_means_kernel(d_k, d_v, p_keys, p_values, batch_heads, heads, seq, head_size, D: gl.constexpr):
    """mean_j = sum_i x_i / n, i over the n tokens of block j of k or of v; means lie [B, H, blocks, head size]."""
    BLOCK_K: gl.constexpr = d_k.block_shape[2]
    STAGES: gl.constexpr = 6
    TILE: gl.constexpr = 16384 // D  # tokens of a stage of 32 KB
    dtype: gl.constexpr = d_k.dtype
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1
    )
    tiles = gl.cdiv(seq, TILE)
    half = batch_heads * tiles
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE, D], d_k.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    step = gl.num_programs(0)
    for stage in range(STAGES):
        i_tile = gl.program_id(0) + stage * step
        if i_tile < 2 * half:
            _load_tile(d_k, d_v, b_ring.index(stage), full.index(stage), i_tile, tiles, half, heads)
    # Row j is 1 at the tokens of the j-th block of a tile.
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sum_layout, 2)
    o_part = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, operand)), 1)
    o_token = gl.expand_dims(gl.arange(0, TILE, gl.SliceLayout(0, operand)), 0)
    b_ones = (o_part == o_token // BLOCK_K).to(dtype)
    b_zero = gl.zeros([64, D], gl.float32, sum_layout)
    b_before = b_zero
    count = gl.cdiv(2 * half - gl.program_id(0), step)
    for taken in range(count + 1):
        # The means of the tile before are stored while the matrix unit sums this one, which is none behind the last.
        i_tile = gl.program_id(0) + taken * step
        stage = taken % STAGES
        mbarrier.wait(full.index(stage), (taken // STAGES) & 1, pred=taken < count)
        b_x = seen_as(b_ring.index(stage), dtype, [TILE, D], gl.NVMMASharedLayout(128, 16, 2))
        b_sum = warpgroup_mma(b_ones, b_x, b_zero, use_acc=False, is_async=True)
        if taken > 0:
            before = i_tile - step
            p_means = p_keys
            if before >= half:
                p_means = p_values
            _store_means(
                b_before, p_means, before % half // tiles, before % tiles * TILE, seq, head_size, TILE, BLOCK_K
            )
        b_before = warpgroup_mma_wait(0, deps=[b_sum])
        thread_barrier()  # the stage is read
        if i_tile + STAGES * step < 2 * half:
            _load_tile(
                d_k, d_v, b_ring.index(stage), full.index(stage), i_tile + STAGES * step, tiles, half, heads
            )  # fmt: skip
