"""Gluon: `quantize_triton` on sm_90 for whole rows of 64 or 128 channels, rotated.

As many programs as fit on the multiprocessors at once, each with a ring of tiles of GROUP tokens on their way, of all
heads of q, then k, then v. Rows are read where the order says they lie. The matrix unit does what moves values between
threads: it multiplies tokens of q and k by signs, and those of v, transposed, by ones, both with columns named such that
each thread is left 16 of a row side by side, which are stored as they are.

Names as in `attention_hopper`. All products are [D, 64], two a tile. Of q and k these are the two halves of the channels
of 128 tokens at D = 128, and 64 tokens each at D = 64; of v those of 64 tokens each.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparse_dit.kernels.copies_hopper import thread_barrier
from sparse_dit.kernels.quantize import FP8_MAX, GROUP, INT8_MAX, SMALLEST

TILE = gl.constexpr(GROUP)
INT8_TOP = gl.constexpr(INT8_MAX)
FP8_TOP = gl.constexpr(FP8_MAX)
LEAST = gl.constexpr(SMALLEST)


@gluon.constexpr_function
def rows_layout(D):
    """[D, 64], 16 columns of two rows a thread, as `_seen_by_rows` leaves products."""
    warps = [[16 << i, 0] for i in range((D // 16).bit_length() - 1)]
    columns = [[0, 1], [0, 2], [0, 4], [0, 8]]
    return gl.DistributedLinearLayout([*columns, [8, 0]], [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]], warps, [], [D, 64])


@gluon.jit
def _seen_by_rows(b_x, D: gl.constexpr):
    """Columns 8 j + 2 t + e of a product [D, 64], which a thread t has for all j and e, as columns 16 t + 2 j + e."""
    b_x = b_x.reshape([D, 8, 4, 2]).permute((0, 2, 1, 3)).reshape([D, 64])
    return gl.convert_layout(b_x, rows_layout(D), assert_trivial=True)


@gluon.jit
def _products(b_left, b_right, b_matrix, D: gl.constexpr):
    """The products of two halves [D, 64] of a tile with [64, 64], fp32."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [D // 16, 1], [16, 64, 16])
    b_zero = gl.zeros([D, 64], gl.float32, layout)
    b_0 = warpgroup_mma(b_left, b_matrix, b_zero, use_acc=False, is_async=True)
    b_1 = warpgroup_mma(b_right, b_matrix, b_zero, use_acc=False, is_async=True)
    b_0, b_1 = warpgroup_mma_wait(0, deps=[b_0, b_1])
    return _seen_by_rows(b_0, D), _seen_by_rows(b_1, D)


@gluon.jit
def _rotated(b_x, b_signs, D: gl.constexpr):
    """Tokens of a tile times a Hadamard matrix without its factor: halves of channels at D = 128, of tokens at 64."""
    if D == 64:
        return _products(b_x.slice(0, 64, 0), b_x.slice(64, 64, 0), b_signs, D)
    else:
        # [[H, H], [H, -H]], H of 64 channels.
        b_0, b_1 = _products(b_x.slice(0, 64, 1), b_x.slice(64, 64, 1), b_signs, D)
        return b_0 + b_1, b_0 - b_1


@gluon.jit
def _int8(b_x, b_factor):
    """See `quantize_triton`; with one rounding less."""
    return gl.fma(b_x, b_factor, 12582912.0).to(gl.int32, bitcast=True).to(gl.int8)


@gluon.jit
def _e4m3(b_x):
    """Four at once, as in `attention_hopper`."""
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
        [b_x],
        gl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _mean_halves(p_mean, D: gl.constexpr):
    """The mean of k of a head, rotated without the factor, as the columns of both halves of a tile have it, [1, 64]."""
    o_column = gl.arange(0, 64, gl.SliceLayout(0, rows_layout(D)))
    b_0 = gl.expand_dims(gl.load(p_mean + o_column), 0)
    if D == 64:
        return b_0, b_0
    else:
        return b_0, gl.expand_dims(gl.load(p_mean + 64 + o_column), 0)


@gluon.jit
def _queries_part(b_top, b_dot, o_place, p_scale, p_shift, seq, scale, scale_log2, D: gl.constexpr):
    """Stores what tokens of q have apart from codes; returns the factors of their codes."""
    b_top = gl.maximum(b_top, LEAST * D**0.5)
    m_place = o_place < seq
    gl.store(p_shift + o_place, b_dot * (scale / D), mask=m_place)
    gl.store(p_scale + o_place, b_top * (scale_log2 * (D**-0.5 / INT8_TOP)), mask=m_place)
    return gl.expand_dims(gl.fdiv(gl.full_like(b_top, INT8_TOP), b_top), 1)


@gluon.jit
def _queries(b_0, b_1, b_mean_0, b_mean_1, p_codes, p_scale, p_shift, first, seq, scale, scale_log2, D: gl.constexpr):
    """Scales, shifts and codes of a tile of q; pointers are those of its head."""
    layout: gl.constexpr = rows_layout(D)
    o_place = first + gl.arange(0, D, gl.SliceLayout(1, layout))
    o_column = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    b_dot = b_0 * b_mean_0
    if D == 64:
        b_top_0, b_top_1 = gl.max(gl.abs(b_0), 1), gl.max(gl.abs(b_1), 1)
        b_dot_0, b_dot_1 = gl.sum(b_dot, 1), gl.sum(b_1 * b_mean_1, 1)
        b_factor_0 = _queries_part(b_top_0, b_dot_0, o_place, p_scale, p_shift, seq, scale, scale_log2, D)
        b_factor_1 = _queries_part(b_top_1, b_dot_1, o_place + 64, p_scale, p_shift, seq, scale, scale_log2, D)
    else:
        b_top = gl.max(gl.maximum(gl.abs(b_0), gl.abs(b_1)), 1)
        b_dot = gl.sum(gl.fma(b_1, b_mean_1, b_dot), 1)
        b_factor_0 = _queries_part(b_top, b_dot, o_place, p_scale, p_shift, seq, scale, scale_log2, D)
        b_factor_1 = b_factor_0
    o_place = gl.expand_dims(o_place, 1)
    p_rows = p_codes + o_place * D + o_column
    gl.store(p_rows, _int8(b_0, b_factor_0), mask=o_place < seq)
    gl.store(p_rows + (64 if D == 128 else 64 * D), _int8(b_1, b_factor_1), mask=o_place + 64 * (D == 64) < seq)


@gluon.jit
def _keys(b_0, b_1, b_mean_0, b_mean_1, p_codes, p_scale, first, seq, D: gl.constexpr):
    """Scale and codes of a tile of k. Behind the end lies the last token again: it moves no maximum; its codes are 0."""
    layout: gl.constexpr = rows_layout(D)
    b_0 -= b_mean_0
    b_1 -= b_mean_1
    top = gl.maximum(gl.max(gl.max(gl.maximum(gl.abs(b_0), gl.abs(b_1)), 1), 0), LEAST * D**0.5)
    gl.store(p_scale + first // TILE, top * (D**-0.5 / INT8_TOP))
    factor = gl.fdiv(INT8_TOP + 0 * top, top)
    o_place = gl.expand_dims(first + gl.arange(0, D, gl.SliceLayout(1, layout)), 1)
    o_column = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    p_rows = p_codes + o_place * D + o_column
    gl.store(p_rows, _int8(b_0, gl.where(o_place < seq, factor, 0.0)))
    o_place += 64 * (D == 64)
    gl.store(p_rows + (64 if D == 128 else 64 * D), _int8(b_1, gl.where(o_place < seq, factor, 0.0)))


@gluon.jit
def _values(b_x, b_ones, p_mean, p_codes, p_scale, first, seq, padded, D: gl.constexpr):
    """Scale and codes of a tile of v, transposed; the ones put tokens into the places that `Quantized` tells."""
    layout: gl.constexpr = rows_layout(D)
    o_dim = gl.arange(0, D, gl.SliceLayout(1, layout))
    b_mean = gl.expand_dims(gl.load(p_mean + o_dim), 1)
    b_0, b_1 = _products(b_x.slice(0, 64, 0).permute((1, 0)), b_x.slice(64, 64, 0).permute((1, 0)), b_ones, D)
    b_0 -= b_mean
    b_1 -= b_mean
    o_column = gl.arange(0, 64, gl.SliceLayout(0, layout))
    if first + TILE > seq:
        o_16 = o_column % 16
        o_token = gl.expand_dims(first + o_column - o_16 + o_16 // 2 % 2 * 8 + o_16 // 4 * 2 + o_16 % 2, 0)
        b_0 = gl.where(o_token < seq, b_0, 0.0)
        b_1 = gl.where(o_token + 64 < seq, b_1, 0.0)
    top = gl.maximum(gl.max(gl.max(gl.maximum(gl.abs(b_0), gl.abs(b_1)), 1), 0), LEAST)
    gl.store(p_scale + first // TILE, gl.div_rn(top, FP8_TOP + 0 * top))
    factor = gl.div_rn(FP8_TOP + 0 * top, top)
    p_rows = p_codes + gl.expand_dims(o_dim, 1).to(gl.int64) * padded + (first + gl.expand_dims(o_column, 0))
    gl.store(p_rows, _e4m3(b_0 * factor))
    gl.store(p_rows + 64, _e4m3(b_1 * factor))


@gluon.jit
def _copied(b_x, p_out, first, seq, COPY: gl.constexpr, D: gl.constexpr):
    """Stores a tile of v as it is."""
    o_place = gl.expand_dims(first + gl.arange(0, TILE, gl.SliceLayout(1, COPY)), 1)
    o_dim = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, COPY)), 0)
    gl.store(p_out + o_place * D + o_dim, b_x.load(COPY), mask=o_place < seq)


@gluon.jit
def _at(i_tile, batch_heads, q_tiles, k_tiles):
    """Of the tile of that number: 0 for q, 1 for k, 2 for v; batch and head; the first of its places."""
    role = 0
    tiles = q_tiles
    if i_tile >= batch_heads * q_tiles:
        i_tile -= batch_heads * q_tiles
        role = 1
        tiles = k_tiles
        if i_tile >= batch_heads * k_tiles:
            i_tile -= batch_heads * k_tiles
            role = 2
    return role, i_tile // tiles, i_tile % tiles * TILE


@gluon.jit
def _start_copy(x, order, number, total, b_ring, stage, COPY: gl.constexpr):
    """Starts the copy of the tile of a number, where there is such a one, and closes its group of copies."""
    p_q, p_k, p_v, strides, batch_heads, heads, seq_q, seq_k, PIECE = x
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token = strides
    p_order, order_head = order
    D: gl.constexpr = b_ring.shape[2]
    if number < total:
        role, i_bh, first = _at(number, batch_heads, gl.cdiv(seq_q, TILE), gl.cdiv(seq_k, TILE))
        i_b, i_h = i_bh // heads, i_bh % heads
        p_x = p_q
        x_batch, x_head, x_token, seq = q_batch, q_head, q_token, seq_q
        if role == 1:
            p_x = p_k
            x_batch, x_head, x_token, seq = k_batch, k_head, k_token, seq_k
        if role == 2:
            p_x = p_v
            x_batch, x_head, x_token, seq = v_batch, v_head, v_token, seq_k
        p_x += (i_b.to(gl.int64) * x_batch + i_h.to(gl.int64) * x_head) * PIECE
        o_place = gl.minimum(first + gl.arange(0, TILE, gl.SliceLayout(1, COPY)), seq - 1)
        if p_order is not None:
            o_place = gl.load(p_order + i_h * order_head + o_place)
        o_token = gl.expand_dims(o_place.to(gl.int64) * (gl.cast(x_token, gl.int64) * PIECE), 1)
        o_dim = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, COPY)), 0)
        async_copy.async_copy_global_to_shared(b_ring.index(stage), p_x + o_token + o_dim)
    async_copy.commit_group()


@gluon.jit
def _wait_for_copy(x, order, number, total, b_ring, stage, COPY: gl.constexpr):
    """Waits for the tile of a number, in its stage, and starts the copy of a later one into that of the tile before."""
    STAGES: gl.constexpr = b_ring.shape[0]
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    thread_barrier()  # the tile is there, and the one before is read
    free = (stage + STAGES - 1) % STAGES
    _start_copy(x, order, number + (STAGES - 1) * gl.num_programs(0), total, b_ring, free, COPY)


@gluon.jit
def hopper_quantize_kernel(
    p_q,
    p_k,
    p_v,
    p_order,
    p_k_mean,
    p_v_mean,
    p_signs,
    p_ones,
    p_q_codes,
    p_q_scale,
    p_lse_shift,
    p_k_codes,
    p_k_scale,
    p_v_codes,
    p_v_scale,
    q_batch,
    q_head,
    q_token,
    q_dim,
    k_batch,
    k_head,
    k_token,
    k_dim,
    v_batch,
    v_head,
    v_token,
    v_dim,
    order_head,
    batch_heads,
    heads,
    seq_q,
    seq_k,
    padded_k,
    scale,
    scale_log2,
    FP8: gl.constexpr,
    ORDERED: gl.constexpr,
    PIECE: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    AFTER_MEANS: gl.constexpr,
):
    """Tiles i, i + programs, i + 2 programs and so on in program i; means of k come without the rotation's factor.

    The means are of a kernel that may still run (programmatic dependent launch): they are waited for when the first
    tiles are on their way.
    """
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [D // 16, 1], [1, 0])
    matrix: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = p_q.dtype.element_ty
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], matrix)
    strides = (q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token)
    x = (p_q, p_k, p_v, strides, batch_heads, heads, seq_q, seq_k, PIECE)
    order = (p_order, order_head)
    q_tiles, k_tiles = gl.cdiv(seq_q, TILE), gl.cdiv(seq_k, TILE)
    total = batch_heads * (q_tiles + k_tiles * (2 if FP8 or ORDERED else 1))
    start, programs = gl.program_id(0), gl.num_programs(0)
    for ahead in gl.static_range(STAGES - 1):
        _start_copy(x, order, start + ahead * programs, total, b_ring, ahead, COPY)
    square: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [D // 16, 1], [1, 0])
    o_64 = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, square)), 1) * 64
    o_64 += gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, square)), 0)
    b_signs = gl.allocate_shared_memory(dtype, [64, 64], matrix)
    b_signs.store(gl.load(p_signs + o_64))
    if FP8:
        b_ones = gl.allocate_shared_memory(dtype, [64, 64], matrix)
        b_ones.store(gl.load(p_ones + o_64))
    if AFTER_MEANS:
        gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)
    stage = 0
    both = batch_heads * (q_tiles + k_tiles)
    for number in range(start, both, programs):
        _wait_for_copy(x, order, number, total, b_ring, stage, COPY)
        role, i_bh, first = _at(number, batch_heads, q_tiles, k_tiles)
        i_bh = i_bh.to(gl.int64)
        b_mean_0, b_mean_1 = _mean_halves(p_k_mean + i_bh * D, D)
        b_0, b_1 = _rotated(b_ring.index(stage), b_signs, D)
        if role == 0:
            o_row = i_bh * seq_q
            _queries(
                b_0, b_1, b_mean_0, b_mean_1, p_q_codes + o_row * D, p_q_scale + o_row, p_lse_shift + o_row,
                first, seq_q, scale, scale_log2, D,
            )  # fmt: skip
        else:
            p_codes = p_k_codes + i_bh * padded_k * D
            _keys(b_0, b_1, b_mean_0, b_mean_1, p_codes, p_k_scale + i_bh * k_tiles, first, seq_k, D)
        stage = (stage + 1) % STAGES
    # A loop of their own: ptxas shares addresses of products between branches that do not both run.
    if FP8 or ORDERED:
        start += gl.cdiv(gl.maximum(both - start, 0), programs) * programs
        for number in range(start, total, programs):
            _wait_for_copy(x, order, number, total, b_ring, stage, COPY)
            _, i_bh, first = _at(number, batch_heads, q_tiles, k_tiles)
            i_bh = i_bh.to(gl.int64)
            if FP8:
                p_codes = p_v_codes + i_bh * padded_k * D
                p_scale = p_v_scale + i_bh * k_tiles
                _values(b_ring.index(stage), b_ones, p_v_mean + i_bh * D, p_codes, p_scale, first, seq_k, padded_k, D)
            else:
                _copied(b_ring.index(stage), p_v_codes + i_bh * seq_k * D, first, seq_k, COPY, D)
            stage = (stage + 1) % STAGES
