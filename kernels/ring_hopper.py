"""Gluon: tiles of q, k and v on their way into a ring of shared memory, for programs that share all of them out.

Tiles are counted through all heads of q, then of k, then of v; a program takes every n-th. Where one lies is told by
three digits, `place`: tensor and batch entry, head, tile of GROUP tokens. Names as in `attention_hopper`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared

from sparse_dit.kernels.copies_hopper import thread_barrier
from sparse_dit.kernels.quantize import GROUP

TILE = gl.constexpr(GROUP)
# Triton 3.6 has another name than its successors for this.
_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def place_of(number, heads, tiles):
    """Which tensor and batch entry, which head, which tile of it, where all tiles are counted in this order."""
    return number // tiles // heads, number // tiles % heads, number % tiles


@gluon.jit
def place_after(place, step, heads, tiles):
    """Sum of two `place_of`."""
    i_xb, i_h, i_tile = place
    xb_step, h_step, tile_step = step
    i_tile += tile_step
    i_h += h_step + (i_tile >= tiles).to(gl.int32)
    i_xb += xb_step + (i_h >= heads).to(gl.int32)
    return i_xb, gl.where(i_h >= heads, i_h - heads, i_h), gl.where(i_tile >= tiles, i_tile - tiles, i_tile)


@gluon.jit
def token_ids(order, place, seq, COPY: gl.constexpr):
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
def start_copy(x, place, o_token, b_tile, COPY: gl.constexpr, PIECE: gl.constexpr):
    """Starts the copy of the tile at a place, where there is such a one, and closes its group of copies."""
    p_q, p_k, p_v, strides, batch, parts = x
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token = strides
    i_b, i_h, _ = place
    if i_b < parts * batch:
        # Of one type, whatever the launcher makes of each: a number of 32 or 64 bits, or, of 1, a constant.
        p_x = p_q
        x_batch, x_head, x_token = gl.cast(q_batch, gl.int64), gl.cast(q_head, gl.int64), gl.cast(q_token, gl.int64)
        if i_b >= 2 * batch:
            p_x = p_v
            x_batch, x_head, x_token = gl.cast(v_batch, gl.int64), gl.cast(v_head, gl.int64), gl.cast(v_token, gl.int64)
            i_b -= 2 * batch
        elif i_b >= batch:
            p_x = p_k
            x_batch, x_head, x_token = gl.cast(k_batch, gl.int64), gl.cast(k_head, gl.int64), gl.cast(k_token, gl.int64)
            i_b -= batch
        p_x += (i_b * x_batch + i_h * x_head) * PIECE
        o_row = gl.expand_dims(o_token.to(gl.int64) * (x_token * PIECE), 1)
        o_dim = gl.expand_dims(gl.arange(0, b_tile.shape[1], gl.SliceLayout(0, COPY)), 0)
        _load(b_tile, p_x + o_row + o_dim)
    async_copy.commit_group()


@gluon.jit
def wait_for_copy(STAGES: gl.constexpr):
    """Waits until the oldest tile is there, and all threads have read the one before it."""
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    thread_barrier()
