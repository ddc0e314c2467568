"""What is said when a GPU has too little memory, and whether it is what a call allocates."""

import pytest
import torch

from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.memory import call_bytes
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


def test_bytes_of_a_call_that_can_be_counted_by_hand():
    q = torch.empty(1, 12, 32_760, 128, dtype=torch.bfloat16, device="meta")
    order = torch.empty(1, 32_760, dtype=torch.int64, device="meta")
    row = 12 * 32_760 * 128
    assert call_bytes(q, q, None, "native", "hopper") == {
        "out": 2 * row, "lse": 12 * 32_760 * 4, "q, k and v in order": 0,
    }  # fmt: skip
    assert call_bytes(q, q, order, "native", "hopper")["q, k and v in order"] == 6 * row
    assert call_bytes(q, q, order, "native", "triton")["q, k and v in order"] == 4 * row
    assert call_bytes(q, q, order, "int8_fp8", "triton")["codes"] == row + 2 * 12 * 32_768 * 128
    assert call_bytes(q, q, order, "int8", "triton")["v in order"] == 2 * row


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
    told = sum(call_bytes(q, k, order, precision, "triton").values())
    assert told <= taken <= told * 1.05 + 2**20, out[1].shape
