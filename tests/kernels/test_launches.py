"""Launches by remembered kernels do what Triton's own would."""

import functools
from types import SimpleNamespace

import pytest
import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from sparse_dit.kernels import launches
from sparse_dit.kernels.launches import launch_kernel


class Compiled(CompiledKernel):
    """Stands in for what Triton compiles, and notes its launches and how they came."""

    function, packed_metadata = "function", "packed"

    def __init__(self):
        self.launches, self.ways, self.module = [], [], None  # no module: nothing to unload

    def __getitem__(self, grid):
        self.ways.append("compiled[grid]")
        return lambda *args: self.launches.append((grid, args))

    @property
    def run(self):
        def run(x, y, z, stream, function, packed, metadata, enter, leave, *args):
            assert (stream, function, packed) == ("stream", "function", "packed")
            assert metadata is enter is leave is None
            self.ways.append("run")
            self.launches.append(((x, y, z), args))

        return run


class Kernel:
    """Stands in for a kernel of two pointers, two numbers and a constant."""

    arg_names = ("p_x", "p_y", "size", "scale", "WIDTH")

    def __init__(self, compiled=Compiled):
        self.fn = lambda: None
        self.compiled = compiled
        self.made = []

    def __getitem__(self, grid):
        return functools.partial(self.compile, grid)

    def compile(self, grid, *args, **fixed):
        self.made.append((grid, args, fixed, self.compiled()))
        return self.made[-1][-1]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(launches, "_known", {})
    monkeypatch.setattr(launches, "_leading", {})
    launches._is_known_triton.cache_clear()
    active = SimpleNamespace(get_current_stream=lambda device: "stream")
    monkeypatch.setattr(launches, "driver", SimpleNamespace(active=active))


@pytest.mark.parametrize("way", ["run", "compiled[grid]"])
def test_the_first_launch_is_tritons_and_the_next_one_takes_addresses(monkeypatch, way):
    # Of a Triton that nobody has looked at only what everybody may call is called.
    monkeypatch.setattr(triton, "__version__", "3.9.1" if way == "run" else "9.0.0")
    kernel, x, y = Kernel(), torch.zeros(4), torch.zeros(4)
    launch_kernel(kernel, (3,), x, None, 7, 0.5, WIDTH=64, num_warps=4)
    ((grid, args, fixed, compiled),) = kernel.made
    assert (grid, args, fixed) == ((3,), (x, None, 7, 0.5), {"WIDTH": 64, "num_warps": 4})
    launch_kernel(kernel, (5, 2), y, None, 7, 0.5, WIDTH=64, num_warps=4)
    assert len(kernel.made) == 1
    assert compiled.launches == [((5, 2, 1), (y.data_ptr(), None, 7, 0.5, 64))]
    assert compiled.ways == [way]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_who_wants_to_know_of_launches_is_told(hook):
    kernel, hooks = Kernel(), getattr(knobs.runtime, hook)
    for watched in (False, True, False):
        if watched:
            hooks.add(print)
        launch_kernel(kernel, (3,), torch.zeros(4), None, 7, 0.5, WIDTH=64)
        hooks.remove(print)
    ((*_, compiled),) = kernel.made
    assert compiled.ways == ["compiled[grid]", "run"]


@pytest.mark.parametrize(
    ("args", "fixed"),
    [
        ((torch.zeros(4, dtype=torch.float16), None, 7, 0.5), {}),
        ((torch.zeros(5)[1:], None, 7, 0.5), {}),  # starts between pieces of 16 bytes
        ((torch.zeros(4), torch.zeros(4), 7, 0.5), {}),
        ((torch.zeros(4), None, 8, 0.5), {}),
        ((torch.zeros(4), None, 7.0, 0.5), {}),  # equal, and another type
        ((torch.zeros(4), None, 7, 0.5), {"WIDTH": 128}),
        ((torch.zeros(4), None, 7, 0.5), {"num_warps": 8}),
    ],
)
def test_another_look_is_compiled_anew(args, fixed):
    kernel = Kernel()
    launch_kernel(kernel, (3,), torch.zeros(4), None, 7, 0.5, WIDTH=64, num_warps=4)
    launch_kernel(kernel, (3,), *args, **({"WIDTH": 64, "num_warps": 4} | fixed))
    assert len(kernel.made) == 2
    assert not any(compiled.launches for *_, compiled in kernel.made)


def test_boxes_come_first_and_count_by_dtype_and_block():
    def box(dtype, *block):
        return SimpleNamespace(base=torch.zeros(4, dtype=dtype), block_shape=list(block))

    kernel = Kernel()
    kernel.arg_names = ("d_x", *kernel.arg_names)
    first, alike, other = box(torch.half, 64, 8), box(torch.half, 64, 8), box(torch.half, 32, 8)
    for one in (first, alike, other, None):
        launch_kernel(kernel, (3,), torch.zeros(4), None, 7, 0.5, WIDTH=64, boxes=(one,))
    assert [args[0] for _, args, _, _ in kernel.made] == [first, other, None]
    ((_, args),) = kernel.made[0][-1].launches
    assert args[0] is alike


def test_tensors_come_before_numbers():
    with pytest.raises(TypeError, match=r"^<lambda>: a tensor behind a number; valid: tensors, or None, then numbers$"):
        launch_kernel(Kernel(), (3,), torch.zeros(4), 7, torch.zeros(4), WIDTH=64)


@pytest.mark.parametrize("left", [lambda: None, object])
def test_what_leaves_no_compiled_kernel_is_launched_by_triton_each_time(left):
    """An interpreted kernel, or one that is still being compiled."""
    kernel = Kernel(left)
    for _ in range(2):
        launch_kernel(kernel, (3,), torch.zeros(4), None, 7, 0.5, WIDTH=64)
    assert len(kernel.made) == 2


def test_on_amd_sizes_of_tensors_count_too(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    kernel = Kernel()
    for _ in range(2):
        launch_kernel(kernel, (3,), torch.zeros(4), None, 7, 0.5, WIDTH=64)
    assert len(kernel.made) == 2


def test_known_launches_are_bounded(monkeypatch):
    monkeypatch.setattr(launches, "LIMIT", 2)
    kernel = Kernel()
    for size in (5, 6, 7, 7, 5):
        launch_kernel(kernel, (3,), torch.zeros(4), None, size, 0.5, WIDTH=64)
    assert [args[2] for _, args, _, _ in kernel.made] == [5, 6, 7, 5]


def test_descriptors_made_again_are_like_the_first():
    from sparse_dit.kernels.hopper import _descriptor

    x, y = torch.zeros(2, 3, 100, 64, dtype=torch.half), torch.ones(2, 3, 100, 64, dtype=torch.half)
    first, again = _descriptor(x, 128, 64), _descriptor(y, 128, 64)
    assert type(again) is type(first)
    assert {**vars(again), "base": None} == {**vars(first), "base": None}
    assert (first.base is x, again.base is y) == (True, True)
    # A view of other strides, and one entry whose stride may be anything.
    assert _descriptor(y[:, :, ::2], 128, 64).strides == [19200, 6400, 128, 1]
    assert _descriptor(y[:1], 128, 64).strides[0] == 8


@pytest.mark.gpu
def test_on_a_gpu_both_launches_write_the_same(monkeypatch):
    monkeypatch.setattr(launches, "driver", driver)
    from sparse_dit.kernels.gather_triton import triton_gather

    for seed in range(3):  # the first is Triton's, the others are remembered
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(2, 3, 500, 64, device="cuda", generator=generator).bfloat16()
        order = torch.randperm(500, device="cuda", generator=generator)[None]
        (out,) = triton_gather((x,), order)
        assert torch.equal(out, x[:, :, order[0]])
