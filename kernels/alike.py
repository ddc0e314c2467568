"""Questions whose answer follows from what tensors look like, not from what they hold: calls alike ask once.

A model makes the same call in every layer and step. Checking its arguments and choosing a kernel for it anew took a
tenth of the host's time.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList

LIMIT = 4096
"""Answers that are remembered; then all are forgotten, for a program whose sizes differ in every call."""

T = TypeVar("T")
_NOTHING = object()
_PLAIN = frozenset((bool, float, int, str))


def remembered(ask: Callable[..., T]) -> Callable[..., T]:
    """The function, asked once for all arguments that look alike; errors are not remembered.

    It takes positional arguments, the first of which is a tensor, and may read of tensors the shape, the strides, the
    dtype, the device and whether they start at a multiple of 16 bytes; of block lists the shape, the device and the
    sizes of blocks; anything of other arguments, which are hashable and told apart by being equal.
    """
    answers: dict[Hashable, T] = {}

    @functools.wraps(ask)
    def asked(*args: Any) -> T:
        # Traced sizes are symbols, which no dict can look up, and other classes of tensors may have no memory.
        if torch.compiler.is_compiling() or type(args[0]) is not Tensor:
            return ask(*args)
        try:
            key = tuple([x if x is None or type(x) in _PLAIN else _look(x) for x in args])
        except RuntimeError:  # tensors that functions such as `torch.vmap` wrap have no address
            return ask(*args)
        # One look: other threads may forget all in between.
        known = answers.get(key, _NOTHING)
        if known is not _NOTHING:
            return cast(T, known)
        answer = ask(*args)
        if len(answers) >= LIMIT:
            answers.clear()
        answers[key] = answer
        return answer

    return asked


def _look(x: object) -> Hashable:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0
    if isinstance(x, BlockList):
        return x.indices.shape, x.indices.device, x.block_q, x.block_k, x.key_blocks
    return x
