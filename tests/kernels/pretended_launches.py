"""Kernels that work on the memory of a CPU, launched and noted as those of a GPU are (the fixture `on_a_gpu`)."""

import ctypes
import functools
from typing import NamedTuple

import torch
from triton.runtime import driver

from sparse_dit.kernels.launches import Known
from sparse_dit.kernels.recorder import noting
from sparse_dit.kernels.replays import Replays

SIZE = 8


def floats(address):
    return (ctypes.c_float * SIZE).from_address(address)


def added(x, y, z, stream, function, packed, metadata, enter, leave, first, second, out, factor):
    """A "kernel" that works on addresses: out = first + factor second. None is zeros, a descriptor its tensor."""
    assert (x, y, z, stream, function, packed) == (3, 1, 1, driver.active.get_current_stream(0), "function", "packed")
    first, second = (getattr(each, "base", each) for each in (first, second))
    first, second = (each if each is None or isinstance(each, int) else each.data_ptr() for each in (first, second))
    one, two = (floats(each) if each else [0.0] * SIZE for each in (first, second))
    for i in range(SIZE):
        floats(out)[i] = one[i] + factor * two[i]


class Box:
    """Stands in for a TMA descriptor."""

    def __init__(self, base):
        self.base, self.block_shape = base, [4]


KNOWN = Known(compiled=None, constants=[], run=added, function="function", packed="packed")


def launch(first, second, out, factor=1.0, known=KNOWN, box=False):
    """As `launch_kernel` does it."""
    boxes = (Box(first),) if box else ()
    tensors = (second, out) if box else (first, second, out)
    if noting.recorder is not None:
        noting.recorder.note(known, (3, 1, 1), boxes, tensors, (factor,))
    at = [None if x is None else x.data_ptr() for x in (first, second, out)]
    added(3, 1, 1, driver.active.get_current_stream(0), "function", "packed", None, None, None, *at, factor)


class Result(NamedTuple):
    out: torch.Tensor
    told: str = "told"


def numbers(*first):
    return [torch.arange(SIZE, dtype=torch.float32) + start for start in first]


def kinds(calls):
    return [type(kind) for kind in calls._calls.values()]


class Counted:
    """A function that counts how often Python ran it."""

    def __init__(self, compute):
        self.compute, self.count = compute, 0

    def __call__(self, *inputs):
        self.count += 1
        return self.compute(*inputs)


def again(compute, inputs, calls=None, settings=None):
    """Results of calls with each of the inputs in turn, how often Python computed them, and the calls."""
    calls, counted = calls or Replays(), Counted(compute)
    results = [calls.call(settings, given, functools.partial(counted, *given)) for given in inputs]
    return results, counted.count, calls
