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
    gl.store(p_scale, top * (D**-0.5 / INT8_TOP))
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
    gl.store(p_scale, gl.div_rn(top, FP8_TOP + 0 * top))
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
def _square(p_x, D: gl.constexpr):
    """A contiguous matrix [64, 64] in shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [D // 16, 1], [1, 0])
    o_row = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, layout)), 1)
    o_column = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    dtype: gl.constexpr = p_x.dtype.element_ty
    b_x = gl.load(p_x + o_row * 64 + o_column)
    return gl.allocate_shared_memory(dtype, [64, 64], gl.NVMMASharedLayout(128, 16, 2), b_x)


@gluon.jit
def _digits(number, heads, tiles):
    """Which tensor and batch entry, which head, which tile of it, where all tiles are counted in this order."""
    return number // tiles // heads, number // tiles % heads, number % tiles


@gluon.jit
def _sum(place, step, heads, tiles):
    """Sum of two `_digits`."""
    i_xb, i_h, i_tile = place
    xb_step, h_step, tile_step = step
    i_tile += tile_step
    i_h += h_step + (i_tile >= tiles).to(gl.int32)
    i_xb += xb_step + (i_h >= heads).to(gl.int32)
    return i_xb, gl.where(i_h >= heads, i_h - heads, i_h), gl.where(i_tile >= tiles, i_tile - tiles, i_tile)


@gluon.jit
def _tokens(order, place, seq, COPY: gl.constexpr):
    """Ids of the tokens of a tile; behind the last place, of the last token again."""
    p_order, order_head = order
    _, i_h, i_tile = place
    o_place = gl.minimum(i_tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, COPY)), seq - 1)
    if p_order is None:
        return o_place
    else:
        # The lower halves of int64.
        p_low = (p_order + i_h.to(gl.int64) * order_head).to(gl.pointer_type(gl.int32))
        return gl.load(p_low + o_place * 2)


@gluon.jit
def _start_copy(x, place, o_token, b_tile, COPY: gl.constexpr, PIECE: gl.constexpr):
    """Starts the copy of the tile at a place, where there is such a one, and closes its group of copies."""
    p_q, p_k, p_v, strides, batch, parts = x
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token = strides
    i_b, i_h, _ = place
    if i_b < parts * batch:
        p_x = p_q
        x_batch, x_head, x_token = q_batch, q_head, q_token
        if i_b >= 2 * batch:
            p_x = p_v
            x_batch, x_head, x_token = v_batch, v_head, v_token
            i_b -= 2 * batch
        elif i_b >= batch:
            p_x = p_k
            x_batch, x_head, x_token = k_batch, k_head, k_token
            i_b -= batch
        p_x += (i_b.to(gl.int64) * x_batch + i_h.to(gl.int64) * x_head) * PIECE
        o_row = gl.expand_dims(o_token.to(gl.int64) * (gl.cast(x_token, gl.int64) * PIECE), 1)
        o_dim = gl.expand_dims(gl.arange(0, b_tile.shape[1], gl.SliceLayout(0, COPY)), 0)
        async_copy.async_copy_global_to_shared(b_tile, p_x + o_row + o_dim)
    async_copy.commit_group()


@gluon.jit
def _wait_for_copy(STAGES: gl.constexpr):
    """Waits until the oldest tile is there, and all threads have read the one before it."""
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    thread_barrier()


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
    batch,
    heads,
    seq,
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
    PARTS: gl.constexpr = 3 if FP8 or ORDERED else 2
    tiles = gl.cdiv(seq, TILE)
    padded = tiles * TILE
    strides = (q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token)
    x = (p_q, p_k, p_v, strides, batch, PARTS)
    order = (p_order, order_head)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], matrix)
    step = _digits(gl.num_programs(0), heads, tiles)
    place = _digits(gl.program_id(0), heads, tiles)
    ahead = place
    for number in gl.static_range(STAGES - 1):
        _start_copy(x, ahead, _tokens(order, ahead, seq, COPY), b_ring.index(number), COPY, PIECE)
        ahead = _sum(ahead, step, heads, tiles)
    o_token = _tokens(order, ahead, seq, COPY)
    b_signs = _square(p_signs, D)
    if FP8:
        b_ones = _square(p_ones, D)
    if AFTER_MEANS:
        gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)
    stage = 0
    while place[0] < 2 * batch:
        _wait_for_copy(STAGES)
        _start_copy(x, ahead, o_token, b_ring.index((stage + STAGES - 1) % STAGES), COPY, PIECE)
        ahead = _sum(ahead, step, heads, tiles)
        o_token = _tokens(order, ahead, seq, COPY)
        i_xb, i_h, i_tile = place
        i_bh = (gl.where(i_xb < batch, i_xb, i_xb - batch) * heads + i_h).to(gl.int64)
        b_mean_0, b_mean_1 = _mean_halves(p_k_mean + i_bh * D, D)
        b_0, b_1 = _rotated(b_ring.index(stage), b_signs, D)
        if i_xb < batch:
            o_row = i_bh * seq
            _queries(
                b_0, b_1, b_mean_0, b_mean_1, p_q_codes + o_row * D, p_q_scale + o_row, p_lse_shift + o_row,
                i_tile * TILE, seq, scale, scale_log2, D,
            )  # fmt: skip
        else:
            p_codes = p_k_codes + i_bh * padded * D
            _keys(b_0, b_1, b_mean_0, b_mean_1, p_codes, p_k_scale + i_bh * tiles + i_tile, i_tile * TILE, seq, D)
        stage = (stage + 1) % STAGES
        place = _sum(place, step, heads, tiles)
    # A loop of their own: ptxas shares addresses of products between branches of which one does not run.
    while place[0] < PARTS * batch:
        _wait_for_copy(STAGES)
        _start_copy(x, ahead, o_token, b_ring.index((stage + STAGES - 1) % STAGES), COPY, PIECE)
        ahead = _sum(ahead, step, heads, tiles)
        o_token = _tokens(order, ahead, seq, COPY)
        i_xb, i_h, i_tile = place
        i_bh = ((i_xb - 2 * batch) * heads + i_h).to(gl.int64)
        if FP8:
            p_codes = p_v_codes + i_bh * padded * D
            p_scale = p_v_scale + i_bh * tiles + i_tile
            _values(b_ring.index(stage), b_ones, p_v_mean + i_bh * D, p_codes, p_scale, i_tile * TILE, seq, padded, D)
        elif ORDERED:
            _copied(b_ring.index(stage), p_v_codes + i_bh * seq * D, i_tile * TILE, seq, COPY, D)
        stage = (stage + 1) % STAGES
        place = _sum(place, step, heads, tiles)
