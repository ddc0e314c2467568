"""The door: operator registration, compilation, block lists, errors."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.ops import PRECISIONS, block_sparse_attention


@pytest.fixture
def order():
    """Makes an order of its own, or one for all heads."""

    def make(heads, seq):
        generator = torch.Generator().manual_seed(seq)
        return torch.stack([torch.randperm(seq, generator=generator) for _ in range(heads)])

    return make


@pytest.mark.parametrize(
    ("backend", "precision"),
    [("host", "native"), ("triton", "native"), ("host", "int8"), ("triton", "int8"), ("host", "int8_fp8")],
)
@pytest.mark.parametrize(("seq", "orders"), [(128, 0), (100, 1), (100, 2)])
def test_opcheck(qkv, random_mask, order, backend, precision, seq, orders):
    q, k, v = qkv(2, 2, seq, 64)
    order = order(orders, seq) if orders else None
    lists = mask_to_lists(random_mask(1, 2, 2, 2), 64, 64)
    arguments = (q, k, v, lists.indices, lists.counts, order, 64, 64, 0.125, precision, backend)
    torch.library.opcheck(torch.ops.sparse_dit.block_sparse_attention.default, arguments)
    torch.library.opcheck(torch.ops.sparse_dit.block_sparse_attention_eager.default, arguments)
    if order is not None:
        ordered = [gather_tokens(x, order) for x in (q, k, v)]
        torch.library.opcheck(torch.ops.sparse_dit.block_sparse_attention.default, (*arguments, "drop", None, *ordered))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_compiles_into_one_graph(qkv, random_mask, precision):
    lists = mask_to_lists(random_mask(1, 1, 2, 2), 64, 64)

    def layer(q, k, v, lists):
        out, lse = block_sparse_attention(q * 2, k, v, lists, precision=precision)
        return out + 1, lse

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for seq in (100, 128, 70):
        inputs = [x[:, :, :seq] for x in qkv(1, 2, 128, 16)]
        torch.testing.assert_close(compiled(*inputs, lists), layer(*inputs, lists))


def test_compiled_calls_share_the_plan(qkv, random_mask, monkeypatch):
    from sparse_dit.kernels import host

    made = []
    groups = host._groups
    monkeypatch.setattr(host, "_groups", lambda *args: made.append(args) or groups(*args))
    q, k, v = qkv(1, 1, 100, 16)
    lists = mask_to_lists(random_mask(1, 1, 2, 2), 64, 64)
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        compiled(q, k, v, lists)
    assert len(made) == 1


def test_fake_tensors_have_the_real_shapes_and_strides(qkv, random_mask):
    q, k, v = qkv(2, 3, 100, 16)
    lists = mask_to_lists(random_mask(1, 1, 2, 2), 64, 64)
    real = block_sparse_attention(q, k, v, lists)
    with FakeTensorMode() as mode:
        fake_lists = replace(lists, indices=mode.from_tensor(lists.indices), counts=mode.from_tensor(lists.counts))
        fake = block_sparse_attention(*(mode.from_tensor(x) for x in (q, k, v)), fake_lists)
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("backend", ["host", "triton"])
@pytest.mark.parametrize("orders", [1, 2])
def test_native_order_is_a_gather_before_and_a_scatter_behind(qkv, random_mask, order, orders, backend):
    """Attention does not depend on how tokens are numbered: blocks hold what the order puts there."""
    q, k, v = qkv(2, 2, 100, 64)
    lists = mask_to_lists(random_mask(1, 2, 4, 2), 32, 64)
    order = order(orders, 100)
    out, lse = block_sparse_attention(q, k, v, lists, order=order, backend=backend)
    for head in range(2):
        ids = order[head % orders]
        gathered = (x[:, head : head + 1, ids] for x in (q, k, v))
        one = replace(lists, indices=lists.indices[:, head : head + 1], counts=lists.counts[:, head : head + 1])
        expected_out, expected_lse = block_sparse_attention(*gathered, one, backend=backend)
        torch.testing.assert_close(out[:, head : head + 1, ids], expected_out)
        torch.testing.assert_close(lse[:, head : head + 1, ids], expected_lse)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("backend", "precision"), [("host", "native"), ("triton", "native"), ("host", "int8"), ("triton", "int8")]
)
@pytest.mark.parametrize("orders", [1, 2])
def test_tensors_in_order_already_are_taken_as_they_are(qkv, random_mask, order, orders, backend, precision):
    """With keys in an order of their own, too: blocks of keys hold what that puts there."""
    q, k, v = qkv(2, 2, 100, 64)
    lists = mask_to_lists(random_mask(1, 2, 4, 2), 32, 64)
    q_order, k_order = order(2, 100)[:orders], order(4, 100)[2 : 2 + orders]
    options = {"backend": backend, "precision": precision}
    tokens = [gather_tokens(x, by) for x, by in ((q, q_order), (k, k_order), (v, k_order))]
    out, lse = block_sparse_attention(q, k, v, lists, order=q_order, ordered=tokens, **options)
    expected_out, expected_lse = block_sparse_attention(*tokens, lists, **options)
    torch.testing.assert_close(gather_tokens(out, q_order), expected_out)
    torch.testing.assert_close(gather_tokens(lse, q_order), expected_lse)
    assert out.transpose(1, 2).is_contiguous()


def test_tensors_in_order_that_do_not_fit_are_refused(qkv, random_mask, order):
    q, k, v = qkv(1, 2, 100, 16)
    lists = mask_to_lists(random_mask(1, 2, 2, 2), 64, 64)
    with pytest.raises(ValueError, match=r"^ordered: given without an order; valid: None, or q, k and v in the order"):
        block_sparse_attention(q, k, v, lists, ordered=(q, k, v))
    with pytest.raises(ValueError, match=r"^ordered: 2 tensors, torch.float32 .*; valid: q, k and v, torch.float32"):
        block_sparse_attention(q, k, v, lists, order=order(1, 100), ordered=(k, v))
    with pytest.raises(ValueError, match=r"^ordered: 3 tensors, torch.float32 \[1, 2, 99, 16\]"):
        block_sparse_attention(q, k, v, lists, order=order(1, 100), ordered=(q, k[:, :, 1:], v))


def test_importing_the_door_loads_torch_alone():
    # What torch itself imports is no sign of ours.
    code = (
        "import sys, torch; before = set(sys.modules); import sparse_dit.kernels.ops; print(set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'sparse_dit.kernels.ops'" in run.stdout
    for package in ("triton", "diffusers", "transformers"):
        assert f"'{package}'" not in run.stdout


def make_list(indices, counts, block_q=64, block_k=64):
    indices = torch.as_tensor(indices, dtype=torch.int32)[None, None]
    return BlockList(indices, torch.as_tensor(counts, dtype=torch.int32)[None, None], block_q, block_k)


def test_a_checked_list_knows_its_key_blocks():
    assert make_list([[0, 4], [2, 99]], [2, 1]).key_blocks == 5


@pytest.mark.parametrize(
    ("indices", "counts", "message"),
    [
        ([[0, 1], [0, 1]], [1, 0], "counts: a row has 0 key blocks; valid: at least 1 in every row"),
        ([[0, 1], [0, 1]], [1, 3], "counts: 3; valid: at most 2, the width of indices"),
        ([[0, 1], [-1, 1]], [2, 2], "indices: an entry is negative; valid: key blocks counted from 0"),
        ([[1, 0]], [2], "indices: a row does not ascend; valid: distinct key blocks in ascending order"),
        ([[1, 1]], [2], "indices: a row does not ascend; valid: distinct key blocks in ascending order"),
    ],
)
def test_bad_entries(indices, counts, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_list(indices, counts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_q": 48}, r"block_q: 48; valid: one of \(16, 32, 64, 128\)"),
        ({"block_k": 0}, r"block_k: 0; valid: one of \(16, 32, 64, 128\)"),
        ({"key_blocks": -1}, "key_blocks: -1; valid: at least 1, or 0 to read it from the lists"),
        (
            {"indices": torch.zeros(1, 1, 2, 2, dtype=torch.int64)},
            r"indices: torch.int64 \[1, 1, 2, 2\]; valid: torch.int32, 4 dimensions, none empty",
        ),
        (
            {"indices": torch.zeros(2, 2, dtype=torch.int32)},
            r"indices: torch.int32 \[2, 2\]; valid: torch.int32, 4 dimensions, none empty",
        ),
        (
            {"counts": torch.ones(1, 1, 2)},
            r"counts: torch.float32 \[1, 1, 2\]; valid: torch.int32, 3 dimensions, none empty",
        ),
        (
            {"counts": torch.ones(1, 1, 3, dtype=torch.int32)},
            r"counts: shape \[1, 1, 3\]; valid: \[1, 1, 2\], the rows of indices",
        ),
        (
            {"counts": torch.ones(1, 1, 2, dtype=torch.int32, device="meta")},
            r"counts: on meta; valid: cpu, where indices is",
        ),
    ],
)
def test_bad_lists(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(mask_to_lists(torch.ones(1, 1, 2, 2, dtype=torch.bool), 64, 64), **change)


Q = torch.zeros(2, 3, 100, 64)
LISTS = mask_to_lists(torch.ones(1, 1, 2, 2, dtype=torch.bool), 64, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q.double()}, "q: torch.float64; valid: one of torch.float16, torch.bfloat16, torch.float32"),
        ({"q": Q[0]}, r"q: shape \[3, 100, 64\]; valid: a non-empty tensor \[B, H, S, D\]"),
        ({"q": Q[:, :, :0]}, r"q: shape \[2, 3, 0, 64\]; valid: a non-empty tensor \[B, H, S, D\]"),
        ({"k": Q.half()}, "k: torch.float16 on cpu; valid: torch.float32 on cpu, like q"),
        ({"v": Q.to("meta")}, "v: torch.float32 on meta; valid: torch.float32 on cpu, like q"),
        ({"k": Q[:, :2]}, r"k: shape \[2, 2, 100, 64\]; valid: \[2, 3, 100, 64\], by the shapes of q and k"),
        ({"v": Q[:, :, :99]}, r"v: shape \[2, 3, 99, 64\]; valid: \[2, 3, 100, 64\], by the shapes of q and k"),
        ({"v": Q[..., :32]}, r"v: shape \[2, 3, 100, 32\]; valid: \[2, 3, 100, 64\], by the shapes of q and k"),
        ({"scale": 0.0}, r"scale: 0.0; valid: a positive finite number, or None for 1 / sqrt\(D\)"),
        ({"scale": float("nan")}, r"scale: nan; valid: a positive finite number, or None for 1 / sqrt\(D\)"),
        (
            {"backend": "cuda"},
            r"backend: 'cuda'; valid: one of \('hopper', 'triton', 'host'\), or None to choose by device and dtype",
        ),
        (
            {"blocks": mask_to_lists(torch.ones(1, 1, 3, 2, dtype=torch.bool), 64, 64)},
            "blocks: 3 query blocks of 64; valid: 2 for 100 query tokens",
        ),
        (
            {"blocks": mask_to_lists(torch.ones(1, 1, 2, 3, dtype=torch.bool), 64, 64)},
            "blocks: lists over 3 key blocks of 64; valid: at most 2 for 100 key tokens",
        ),
        (
            {"blocks": mask_to_lists(torch.ones(3, 1, 2, 2, dtype=torch.bool), 64, 64)},
            "blocks: lists for 3 batch entries; valid: 1 or 2, as q has",
        ),
        (
            {"blocks": mask_to_lists(torch.ones(1, 2, 2, 2, dtype=torch.bool), 64, 64)},
            "blocks: lists for 2 heads; valid: 1 or 3, as q has",
        ),
        ({"precision": "fp8"}, r"precision: 'fp8'; valid: one of \('native', 'int8', 'int8_fp8'\)"),
        (
            {"order": torch.zeros(1, 100)},
            r"order: torch.float32 \[1, 100\]; valid: torch.int64 \[1, 100\] or \[3, 100\]",
        ),
        (
            {"order": torch.zeros(2, 100, dtype=torch.int64)},
            r"order: torch.int64 \[2, 100\]; valid: torch.int64 \[1, 100\] or \[3, 100\]",
        ),
        (
            {"order": torch.zeros(1, 100, dtype=torch.int64, device="meta")},
            "order: on meta; valid: cpu, where q is",
        ),
        (
            {"order": torch.zeros(1, 100, dtype=torch.int64), "k": Q[:, :, :99], "v": Q[:, :, :99]},
            "order: given for 100 queries and 99 keys; valid: as many queries as keys, or None",
        ),
        ({"blocks": LISTS.to("meta")}, r"blocks: on meta; valid: cpu, where q is \(see BlockList.to\)"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"q": Q, "k": Q, "v": Q, "blocks": LISTS} | change
    with pytest.raises(ValueError, match=f"^{message}$"):
        block_sparse_attention(**arguments)


@pytest.mark.parametrize(
    ("interpret", "dtype", "head_size", "message"),
    [
        ("0", torch.float32, 64, "backend: 'triton' with tensors on cpu; valid: CUDA tensors, or backend 'host'"),
        ("1", torch.bfloat16, 64, "q: torch.bfloat16; valid in Triton's interpreter: torch.float16 or torch.float32"),
        ("1", torch.float32, 80, r"q: head size 80; valid for backend 'triton': one of \(64, 72, 88, 96, 128, 256\)"),
    ],
)
def test_what_triton_cannot_run_is_an_error(monkeypatch, interpret, dtype, head_size, message):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    q = torch.zeros(1, 1, 100, head_size, dtype=dtype)
    with pytest.raises(ValueError, match=f"^{message}$"):
        block_sparse_attention(q, q, q, LISTS, backend="triton")


@pytest.mark.gpu
def test_a_call_does_not_wait_for_the_gpu(qkv, random_mask):
    q, k, v = qkv(1, 2, 500, 64, torch.bfloat16, "cuda")
    lists = mask_to_lists(random_mask(1, 1, 8, 8).cuda(), 64, 64)
    block_sparse_attention(q, k, v, lists)  # the first call compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_sparse_attention(q, k, v, lists)
        BlockList(lists.indices, lists.counts, 64, 64, key_blocks=8)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_gradients_are_an_error_and_vmap_goes_call_by_call(qkv, random_mask):
    q, k, v = qkv(1, 2, 100, 16)
    lists = mask_to_lists(random_mask(1, 1, 2, 2), 64, 64)
    out, lse = block_sparse_attention(q.requires_grad_(), k, v, lists)
    with pytest.raises(RuntimeError, match=r"backward through sparse_dit.block_sparse_attention.* no autograd formula"):
        (out.sum() + lse.sum()).backward()
    with torch.no_grad():
        assert not block_sparse_attention(q, k, v, lists)[0].requires_grad
        stacked = torch.stack([q, 2 * q])
        outs = torch.vmap(lambda q: block_sparse_attention(q, k, v, lists)[0])(stacked)
        for got, one in zip(outs, stacked, strict=True):
            torch.testing.assert_close(got, block_sparse_attention(one, k, v, lists)[0])
