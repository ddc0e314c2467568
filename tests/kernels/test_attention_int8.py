"""The INT8 and FP8 kernels against attention in float64 on what the same codes stand for."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_dit.kernels.backends import TRITON_HEAD_SIZES
from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.kernels.oracle import oracle_quantized_attention
from sparse_dit.kernels.quantize import quantize

PRECISIONS = ["int8", "int8_fp8"]

pytestmark = pytest.mark.usefixtures("exact_fp8")


def blocks(seq, block):
    return math.ceil(seq / block)


def orders(heads, seq, device="cpu"):
    generator = torch.Generator().manual_seed(seq)
    return torch.stack([torch.randperm(seq, generator=generator) for _ in range(heads)]).to(device)


def tolerances(codes, dtype, precision, spread):
    """How far out [B, H, S, D] and lse may lie from the float64 oracle on the same codes; w = 2^-24 as in conftest.

    - A score is an exact integer times two scales: 4 roundings of w relative to its size, which is at most
      127^2 C times the scales; exp 4 w; the sum of n weights 4 sqrt(n) w. All of it moves lse and twice out.
    - Weights are rounded to u, 2^-4 in E4M3: n roundings, each on its own product with v, add up to
      4 u sqrt(sum (p v)^2).
      E4M3 weights below 2^-14 of the largest err by 2^-18 of it instead, each: at most n 2^-18 max |v|.
    - out is rounded to the dtype: u of its size.
    """
    w, u = 2.0**-24, torch.finfo(dtype).eps / 2
    n = codes.seq_k
    size = float(codes.q_scale.max() * codes.k_scale.max()) * 127.0**2 * codes.q.shape[-1] * math.log(2)
    weight = 4 * w * size + 4 * w + 4 * math.sqrt(n) * w
    top = float(codes.dequantized()[2].abs().max())
    rounded, least = (2.0**-4, n * 2.0**-18) if precision == "int8_fp8" else (u, 0.0)
    out = 4 * rounded * spread + (2 * weight + u + least) * top
    return out, weight + w * (size + float(codes.lse_shift.abs().max()) + math.log(n)) * 4


@pytest.fixture
def check_codes():
    """Runs the Triton backend and compares it with the oracle on codes from the same quantization."""

    def compare(q, k, v, mask, block_q, block_k, precision, order=None, scale=0.125):
        lists = mask_to_lists(mask, block_q, block_k)
        out, lse = block_sparse_attention(
            q, k, v, lists, scale=scale, precision=precision, order=order, backend="triton"
        )
        assert out.dtype is q.dtype
        assert lse.dtype is torch.float32
        assert out.transpose(1, 2).is_contiguous()
        codes = quantize(q, k, v, precision=precision, scale=scale, order=order, backend="triton")
        expected_out, expected_lse, spread = oracle_quantized_attention(codes, mask, block_q, block_k)
        if order is not None:
            out, lse = gather_tokens(out, order), gather_tokens(lse, order)
        tolerance_out, tolerance_lse = tolerances(codes, q.dtype, precision, spread)
        error = (out.double() - expected_out).abs()
        assert (error <= tolerance_out).all(), float((error / tolerance_out).max())
        torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance_lse, rtol=0)

    return compare


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("seq", [1, 63, 64, 65, 300])
def test_ragged_lengths(check_codes, qkv, random_mask, seq, precision):
    q, k, v = qkv(1, 1, seq, 64, torch.float16)
    check_codes(q, k, v, random_mask(1, 1, blocks(seq, 64), blocks(seq, 64)), 64, 64, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("head_size", TRITON_HEAD_SIZES[1:])
def test_head_sizes(check_codes, qkv, random_mask, head_size, precision):
    q, k, v = qkv(1, 2, 150, head_size, torch.float16)
    check_codes(q, k, v, random_mask(1, 1, 3, 3), 64, 64, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (16, 128), (64, 32), (128, 128)])
def test_block_sizes(check_codes, qkv, random_mask, block_q, block_k, precision):
    q, k, v = qkv(1, 1, 150, 64, torch.float16)
    mask = random_mask(1, 1, blocks(150, block_q), blocks(150, block_k))
    check_codes(q, k, v, mask, block_q, block_k, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("order_heads", [1, 2])
def test_orders(check_codes, qkv, random_mask, order_heads, precision):
    q, k, v = qkv(1, 2, 130, 64, torch.float16)
    check_codes(q, k, v, random_mask(1, 2, 3, 3), 64, 64, precision, orders(order_heads, 130))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_more_keys_than_queries(check_codes, qkv, random_mask, precision):
    q, k, v = qkv(1, 2, 70, 64, torch.float16, seq_k=300)
    check_codes(q, k, v, random_mask(1, 2, 2, 5), 64, 64, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_views_with_offsets_and_odd_strides(check_codes, random_mask, precision):
    memory = torch.randn(2, 133, 3, 2, 64).half()
    q, k, v = (memory[:, 33:, i].transpose(1, 2) for i in range(3))
    v = v.mT.contiguous().mT  # even the head dimension strided
    check_codes(q, k, v, random_mask(1, 2, 2, 2), 64, 64, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_block_holds_all_the_mass(qkv, exact_fp8, precision):
    """With scores of +-50, attention is the mean of V over the planted block if it is listed."""
    q, k, v = qkv(1, 1, 256, 64, torch.float16)
    q, k = torch.ones_like(q), torch.full_like(k, -1.0)
    k[:, :, 64:128] = 1.0
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)[None, None]
    lists = mask_to_lists(mask, 64, 64)
    out, lse = block_sparse_attention(q, k, v, lists, scale=50 / 64, precision=precision, backend="triton")
    # The 64 equal weights are exact; v in E4M3 errs by 2^-4 of its size, the mean of 64 by an eighth of that.
    atol = 2e-3 if precision == "int8" else 4 * 2.0**-4 / 8
    mean = v[:, :, 64:128].float().mean(2, keepdim=True).expand(-1, -1, 128, -1)
    torch.testing.assert_close(out[:, :, :128].float(), mean, atol=atol, rtol=0)
    torch.testing.assert_close(lse[:, :, :128], torch.full((1, 1, 128), 50 + math.log(64)), atol=0, rtol=0.01)
    torch.testing.assert_close(lse[:, :, 128:192], torch.full((1, 1, 64), -50 + math.log(192)), atol=0, rtol=0.01)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_host_computes_from_the_same_codes(check_codes, qkv, random_mask, precision):
    """Both backends within rounding of the weights of each other, order included."""
    q, k, v = qkv(1, 2, 130, 64, torch.float16)
    lists = mask_to_lists(random_mask(1, 2, 3, 3), 64, 64)
    order = orders(2, 130)
    out, lse = block_sparse_attention(q, k, v, lists, precision=precision, order=order, backend="host")
    other_out, other_lse = block_sparse_attention(q, k, v, lists, precision=precision, order=order, backend="triton")
    rounding = 2.0**-4 if precision == "int8_fp8" else 2.0**-10
    assert (out.float() - other_out.float()).norm() <= rounding * out.float().norm()
    torch.testing.assert_close(lse, other_lse, atol=1e-3, rtol=0)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seq=st.integers(1, 100),
    head_size=st.sampled_from([64, 72]),
    block_q=st.sampled_from([16, 64]),
    block_k=st.sampled_from([16, 64]),
    density=st.floats(0, 1),
    precision=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 2**20),
)
def test_random_lists(check_codes, qkv, random_mask, seq, head_size, block_q, block_k, density, precision, seed):
    q, k, v = qkv(1, 1, seq, head_size, torch.float16)
    mask = random_mask(1, 1, blocks(seq, block_q), blocks(seq, block_k), density, seed)
    check_codes(q, k, v, mask, block_q, block_k, precision)


@pytest.mark.parametrize(("capability", "hip"), [((8, 6), None), ((9, 4), "6.4")])
def test_gpus_without_e4m3_are_refused(monkeypatch, capability, hip):
    from sparse_dit.kernels import backends

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.version, "hip", hip)

    class OnCuda:
        is_cuda, device = True, "cuda"

    backends._check_fp8(OnCuda(), "int8")
    with pytest.raises(
        ValueError, match=r"^precision: 'int8_fp8' on GPU; valid: NVIDIA GPUs of compute capability 8.9"
    ):
        backends._check_fp8(OnCuda(), "int8_fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
class TestCuda:
    @pytest.mark.parametrize("order_heads", [0, 3])
    @pytest.mark.parametrize("seq", [1, 63, 64, 65, 127, 500, 1000, 2304])
    def test_lengths_and_orders(self, check_codes, qkv, random_mask, seq, order_heads, precision):
        q, k, v = qkv(2, 3, seq, 64, torch.bfloat16, "cuda")
        order = orders(order_heads, seq, "cuda") if order_heads else None
        mask = random_mask(1, 3, blocks(seq, 64), blocks(seq, 64)).cuda()
        check_codes(q, k, v, mask, 64, 64, precision, order)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("head_size", TRITON_HEAD_SIZES[1:])
    @pytest.mark.parametrize("seq", [1000, 2304])
    def test_head_sizes(self, check_codes, qkv, random_mask, seq, head_size, dtype, precision):
        q, k, v = qkv(2, 3, seq, head_size, dtype, "cuda")
        mask = random_mask(1, 3, blocks(seq, 128), blocks(seq, 128)).cuda()
        check_codes(q, k, v, mask, 128, 128, precision, orders(1, seq, "cuda"))

    @pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (128, 16), (16, 128), (32, 64), (64, 32)])
    @pytest.mark.parametrize("head_size", [72, 128])
    def test_block_sizes(self, check_codes, qkv, random_mask, head_size, block_q, block_k, precision):
        q, k, v = qkv(1, 2, 1000, head_size, torch.bfloat16, "cuda")
        mask = random_mask(1, 2, blocks(1000, block_q), blocks(1000, block_k)).cuda()
        check_codes(q, k, v, mask, block_q, block_k, precision)

    @pytest.mark.parametrize("head_size", [64, 128])
    def test_a_model_size(self, check_codes, qkv, random_mask, head_size, precision):
        q, k, v = qkv(1, 1, 17_776, head_size, torch.bfloat16, "cuda")
        mask = random_mask(1, 1, 139, 139, density=0.25).cuda()
        mask[..., -2:, :] = True
        check_codes(q, k, v, mask, 128, 128, precision, orders(1, 17_776, "cuda"))

    def test_views_with_offsets(self, check_codes, random_mask, precision):
        memory = torch.randn(2, 333, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
        q, k, v = (memory[:, 33:, i].transpose(1, 2) for i in range(3))
        check_codes(q, k, v, random_mask(1, 1, 5, 5).cuda(), 64, 64, precision, orders(4, 300, "cuda"))

    def test_a_call_does_not_wait_for_the_gpu(self, qkv, random_mask, precision):
        q, k, v = qkv(1, 2, 500, 64, torch.bfloat16, "cuda")
        lists = mask_to_lists(random_mask(1, 1, 8, 8).cuda(), 64, 64)
        order = orders(1, 500, "cuda")
        block_sparse_attention(q, k, v, lists, precision=precision, order=order)  # the first call compiles
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            block_sparse_attention(q, k, v, lists, precision=precision, order=order)
        finally:
            torch.cuda.set_sync_debug_mode(before)
