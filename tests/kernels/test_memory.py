"""What is said when a GPU has too little memory, when, and whether it is what a call allocates."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from sparse_dit.kernels import memory
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.memory import buffers
from sparse_dit.kernels.ops import PRECISIONS, block_sparse_attention


def test_a_shortage_is_told_in_one_line(qkv, monkeypatch):
    q, k, v = qkv(1, 2, 100, 64)
    lists = mask_to_lists(torch.ones(1, 1, 2, 2, dtype=torch.bool), 64, 64)

    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr("sparse_dit.kernels.host.host_attention", refuse)
    expected = (
        r"^block_sparse_attention: too little memory on cpu for q \[1, 2, 100, 64\]; needed: about 0.00 GiB at once"
    )
    with pytest.raises(torch.OutOfMemoryError, match=expected) as caught:
        block_sparse_attention(q, k, v, lists, order=torch.arange(100)[None])
    assert "\n" not in str(caught.value)
    assert "Tried to allocate" in str(caught.value.__cause__)


@pytest.fixture
def small_gpu(monkeypatch):
    """Makes an allocator of so many bytes, and fails the test where anything is launched; what is let go is free."""

    def make(size):
        taken = []

        class Buffer:
            def __init__(self, wanted, **_):
                if sum(taken) + wanted > size:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
                self.wanted = wanted
                taken.append(wanted)

            def __del__(self):
                if hasattr(self, "wanted"):
                    taken.remove(self.wanted)

        # The module's torch alone: elsewhere torch allocates as ever.
        monkeypatch.setattr(memory, "torch", SimpleNamespace(empty=Buffer, uint8=torch.uint8))
        monkeypatch.setattr(memory, "LARGE", 0)
        return taken

    return make


def launched(*_, **__):
    raise AssertionError("something was launched")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_large_call_finds_out_before_anything_is_launched(qkv, small_gpu, monkeypatch, precision):
    q, k, v = qkv(1, 2, 100, 64, torch.float16)
    lists = mask_to_lists(torch.ones(1, 1, 2, 2, dtype=torch.bool), 64, 64)
    order = torch.arange(100)[None]
    needed = sum(sum(sizes) for sizes in buffers(q, k, order, precision, "triton").values())
    for where in ("gather_triton.triton_gather", "attention.triton_attention", "quantize_triton.triton_quantize"):
        monkeypatch.setattr(f"sparse_dit.kernels.{where}", launched)
    settings = {"precision": precision, "order": order, "backend": "triton"}
    taken = small_gpu(needed - 1)
    with pytest.raises(torch.OutOfMemoryError, match="too little memory on cpu for q"):
        block_sparse_attention(q, k, v, lists, **settings)
    assert taken == []
    small_gpu(needed)
    with pytest.raises(AssertionError, match="something was launched"):
        block_sparse_attention(q, k, v, lists, **settings)


def test_a_small_call_is_not_made_to_wait(qkv, small_gpu, monkeypatch):
    q, k, v = qkv(1, 2, 100, 64, torch.float16)
    lists = mask_to_lists(torch.ones(1, 1, 2, 2, dtype=torch.bool), 64, 64)
    monkeypatch.setattr("sparse_dit.kernels.attention.triton_attention", launched)
    small_gpu(0)
    monkeypatch.setattr(memory, "LARGE", q.nbytes + 1)
    with pytest.raises(AssertionError, match="something was launched"):
        block_sparse_attention(q, k, v, lists, backend="triton")


def test_buffers_of_a_call_that_can_be_counted_by_hand():
    q = torch.empty(1, 12, 32_760, 128, dtype=torch.bfloat16, device="meta")
    order = torch.empty(1, 32_760, dtype=torch.int64, device="meta")
    row, padded = 12 * 32_760 * 128, 12 * 32_768 * 128
    assert buffers(q, q, None, "native", "hopper") == {
        "out": (2 * row,), "lse": (12 * 32_760 * 4,), "q, k and v in order": (),
    }  # fmt: skip
    assert buffers(q, q, order, "native", "hopper")["q, k and v in order"] == (2 * row,) * 3
    assert buffers(q, q, order, "native", "triton")["q, k and v in order"] == (2 * row,) * 2
    assert buffers(q, q, order, "int8_fp8", "triton")["codes"] == (row, padded, padded)
    assert buffers(q, q, order, "int8", "triton")["v in order"] == (2 * row,)


@pytest.mark.gpu
def test_a_gpu_that_is_full_has_nothing_launched_on_it(qkv, monkeypatch):
    """128 MiB each of q, k, v, of what a call makes as well; no 128 are left at once."""
    q, k, v = qkv(1, 16, 32_768, 128, torch.bfloat16, "cuda")
    lists = mask_to_lists(torch.ones(1, 1, 256, 256, dtype=torch.bool, device="cuda"), 128, 128)
    order = torch.arange(32_768, device="cuda")[None]
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 2**28
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    fillers = []
    try:
        # What the allocator holds in pieces, as other tests left it, is no part of the 256 MiB: less than 128 at a time
        # stays free.
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                fillers.append(torch.empty(2**27, dtype=torch.uint8, device="cuda"))
        monkeypatch.setattr("sparse_dit.kernels.gather_triton.triton_gather", launched)
        with pytest.raises(torch.OutOfMemoryError, match=r"needed: about 0\.[35]\d GiB at once .*, free: \d"):
            block_sparse_attention(q, k, v, lists, order=order)
    finally:
        fillers.clear()
        monkeypatch.undo()
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert block_sparse_attention(q, k, v, lists, order=order)[0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_trying_beforehand_takes_no_memory_of_its_own(qkv, precision):
    """128 MiB a tensor, far above `LARGE`: the allocator holds as much as without, to a few of its steps."""
    q, k, v = qkv(1, 16, 32_768, 128, torch.bfloat16, "cuda")
    lists = mask_to_lists(torch.ones(1, 1, 256, 256, dtype=torch.bool, device="cuda"), 128, 128)
    settings = {"precision": precision, "order": torch.arange(32_768, device="cuda")[None]}
    block_sparse_attention(q, k, v, lists, **settings)  # compiles
    held = []
    for large in (2**60, memory.LARGE):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "LARGE", large)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            block_sparse_attention(q, k, v, lists, **settings)
            held.append(torch.cuda.memory_reserved() - before)
    assert held[1] <= held[0] + 2**24


@pytest.mark.gpu
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_call_allocates_what_is_told(qkv, precision, ordered):
    q, k, v = qkv(1, 4, 8192, 128, torch.bfloat16, "cuda")
    lists = mask_to_lists(torch.ones(1, 1, 128, 128, dtype=torch.bool, device="cuda"), 64, 64)
    order = torch.arange(8192, device="cuda")[None] if ordered else None
    settings = {"precision": precision, "order": order, "backend": "triton"}
    block_sparse_attention(q, k, v, lists, **settings)  # compiles, and keeps what is cached
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = block_sparse_attention(q, k, v, lists, **settings)
    taken = torch.cuda.max_memory_allocated() - before
    told = sum(sum(sizes) for sizes in buffers(q, k, order, precision, "triton").values())
    assert told <= taken <= told * 1.05 + 2**20, out[1].shape
