"""Gluon: the online softmax of the Hopper kernel, and totals of FP8 products. Names as in `attention_hopper`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def softmax(b_s, b_max, scale):
    """Online softmax over a tile [64, keys]: weights 2^(s scale - max'), max', what decays the past, `_thread_sums`."""
    b_new_max = gl.maximum(b_max, gl.max(b_s, 1) * scale)  # [64]
    b_p = gl.exp2(b_s * scale - gl.expand_dims(b_new_max, 1))
    b_sums = _thread_sums(b_p.reshape([64, 1, b_p.shape[1]]))
    return b_p, b_new_max, gl.exp2(b_max - b_new_max), gl.sum(b_sums, 1)


@gluon.jit
def _thread_sums(b_p):
    """Sums of weights [64, parts, keys] over the keys that a thread holds, [64, parts, 4]: four threads share a row.

    Threads add theirs to one another's once, after the last tile.
    """
    return gl.sum(gl.sum(b_p.reshape([64, b_p.shape[1], b_p.shape[2] // 8, 4, 2]), 2), 3)


@gluon.jit
def softmax_of_parts(b_s, b_max, b_factor, b_lift):
    """The same over integers [64, parts, keys] times factor [64, parts]; weights are times 2^lift, but in their sums.

    The maximum is taken of the integers: their conversion then hides behind the exponentials.
    """
    b_new_max = gl.maximum(b_max, gl.max(_max_of_parts(b_s).to(gl.float32) * b_factor, 1))  # [64]
    b_zero = gl.expand_dims(b_new_max, 1) - gl.expand_dims(b_lift, 0)  # [64, parts]
    b_p = gl.exp2(b_s.to(gl.float32) * gl.expand_dims(b_factor, 2) - gl.expand_dims(b_zero, 2))
    b_sums = _thread_sums(b_p)
    lift_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, b_sums.type.layout))
    b_drop = gl.exp2(-gl.convert_layout(b_lift, lift_layout))  # [parts]
    b_sums *= gl.expand_dims(gl.expand_dims(b_drop, 0), 2)
    return b_p, b_new_max, gl.exp2(b_max - b_new_max), gl.sum(b_sums, 1)


@gluon.jit
def _max_of_parts(b_s):
    """Maxima of integers [64, parts, keys] over keys, [64, parts].

    Threads take those of all their rows before they exchange any: else each row would wait for the one before.
    """
    b_max = gl.max(gl.max(b_s.reshape([64, b_s.shape[1], b_s.shape[2] // 8, 4, 2]), 2), 3)
    return gl.convert_layout(gl.max(b_max, 2), gl.SliceLayout(2, b_s.type.layout), assert_trivial=True)


@gluon.jit
def add_sums(b_sum, b_decay, b_sums):
    """sum decay + sums, [64, 4]."""
    b_decay = gl.convert_layout(b_decay, gl.SliceLayout(1, b_sum.type.layout))
    return b_sum * gl.expand_dims(b_decay, 1) + b_sums


@gluon.jit
def scales_of_parts(p_k_scale, p_v_lift, p_indices, i_index, blocks, i_part, b_q_scale, PER_GROUP, FP8):
    """factor and lift of the parts of a tile, see `softmax_of_parts`; i_part [parts] are positions in the list."""
    i_part = gl.maximum(gl.minimum(i_part, blocks - 1), 0)
    group = gl.load(p_indices + i_part * i_index) // PER_GROUP
    b_factor = gl.expand_dims(b_q_scale, 1) * gl.expand_dims(gl.load(p_k_scale + group), 0)
    b_lift = gl.zeros_like(group.to(gl.float32))
    if FP8:
        b_lift = gl.load(p_v_lift + group)
    return b_factor, b_lift


@gluon.jit
def keep_total(b_total, b_acc):
    """Stores acc [64, D] in shared memory [D / 8, 128 threads, 4]: a thread's own values, four to a piece."""
    D: gl.constexpr = b_acc.shape[1]
    b_total.store(b_acc.reshape([4, 2, 8, D // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([D // 8, 128, 4]))


@gluon.jit
def add_total(b_total, b_acc, b_total_max, b_max):
    """total 2^(total max - max) + acc, [64, D]."""
    D: gl.constexpr = b_acc.shape[1]
    b_like = b_acc.reshape([4, 2, 8, D // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([D // 8, 128, 4])
    b_kept = b_total.load(b_like.type.layout)
    b_kept = b_kept.reshape([D // 8, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5)).reshape([64, D])
    b_kept = gl.convert_layout(b_kept, b_acc.type.layout, assert_trivial=True)
    b_decay = gl.exp2(b_total_max - b_max)
    return b_kept * gl.convert_layout(gl.expand_dims(b_decay, 1), b_acc.type.layout) + b_acc
