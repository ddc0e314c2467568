"""Codes of q, k and v: how far they lie from what they code, and Triton's against torch's."""

import math

import pytest
import torch
from einops import rearrange

from sparse_dit.kernels.backends import HOPPER_QUANTIZED, TRITON_HEAD_SIZES, quantize_backend
from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.kernels.quantize import CODE_ALIGN, GROUP, LOG2_E, quantize, rotation, sampled_mean

SCALE = 0.1


def orders(heads, seq, device="cpu"):
    generator = torch.Generator().manual_seed(seq)
    return torch.stack([torch.randperm(seq, generator=generator) for _ in range(heads)]).to(device)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def dense(q, k, v, **settings):
    size = math.ceil(q.shape[2] / 64)
    lists = mask_to_lists(torch.ones(1, 1, size, size, dtype=torch.bool, device=q.device), 64, 64)
    return block_sparse_attention(q, k, v, lists, **settings)


@pytest.mark.parametrize("order_heads", [0, 1, 2])
@pytest.mark.parametrize(("seq", "head_size"), [(1, 64), (130, 72), (300, 128), (129, 256), (70, 12)])
@pytest.mark.parametrize("rotate", [False, True])
def test_codes_lie_within_half_a_step(qkv, seq, head_size, order_heads, rotate):
    q, k, v = qkv(2, 2, seq, head_size)
    k = k + 5
    order = orders(order_heads, seq) if order_heads else None
    codes = quantize(q, k, v, precision="int8_fp8", scale=SCALE, order=order, rotate=rotate)
    found_q, found_k, found_v = codes.dequantized()
    matrix = rotation(head_size) if rotate else torch.eye(head_size)
    k_mean, v_mean = sampled_mean(k) @ matrix, sampled_mean(v)
    if order is not None:
        q, k, v = (gather_tokens(x, order) for x in (q, k, v))
    q, k = q @ matrix, k @ matrix - k_mean[:, :, None]
    slack = 1 + 1e-4  # fp32 arithmetic against a step of 1/127
    step_q = codes.q_scale[..., None] / 2
    assert ((found_q - q * SCALE * LOG2_E).abs() <= step_q * slack).all()
    step_k = codes.k_scale.repeat_interleave(GROUP, dim=-1)[:, :, :seq, None] / 2
    assert ((found_k - k).abs() <= step_k * slack).all()
    # E4M3 keeps 3 bits behind the first, and steps of 2^-9 below 2^-6.
    step_v = codes.v_scale.repeat_interleave(GROUP, dim=-1)[:, :, :seq, None] * 2.0**-10
    bound = torch.maximum((v - v_mean[:, :, None]).abs() / 16, step_v)
    assert ((found_v - v).abs() <= bound * slack + 1e-6).all()
    shift = torch.einsum("bhsd,bhd->bhs", q, k_mean) * SCALE
    torch.testing.assert_close(codes.lse_shift, shift, atol=1e-4, rtol=1e-4)


def test_shapes_and_padding(qkv):
    q, k, v = qkv(2, 3, 130, 72)
    codes = quantize(q, k, v, precision="int8_fp8", scale=SCALE)
    assert codes.q.shape == (2, 3, 130, 96)
    assert codes.k.shape == (2, 3, 256, 96)
    assert codes.v.shape == (2, 3, 72, 256)
    assert codes.k_scale.shape == codes.v_scale.shape == (2, 3, 2)
    assert 96 % CODE_ALIGN == 0
    for rest in (codes.q[..., 72:], codes.k[..., 72:], codes.k[:, :, 130:]):
        assert (rest == 0).all()
    # Behind token 129 = 128 + 2 t + e with t = 0, e = 1 its run of 16 holds nothing.
    assert (codes.v[..., 130:].float() == 0).all()
    assert (codes.v[..., 128:130].float() != 0).any()


def test_int8_leaves_v_where_it_is(qkv):
    q, k, v = qkv(1, 2, 100, 64)
    assert quantize(q, k, v, precision="int8", scale=SCALE).v is v


@pytest.mark.parametrize("head_size", [*TRITON_HEAD_SIZES, 12, 320])
def test_the_rotation_is_orthogonal(head_size):
    matrix = rotation(head_size).double()
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(head_size, dtype=torch.float64), atol=1e-6, rtol=0)


def test_zeros_are_zeros(qkv):
    q, k, v = (torch.zeros_like(x) for x in qkv(1, 1, 100, 64))
    for precision in ("int8", "int8_fp8"):
        out, lse = dense(q, k, v, precision=precision)
        assert (out == 0).all()
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(100)))


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.015), ("int8_fp8", 0.04)])
@pytest.mark.parametrize("head_size", [64, 128])
def test_error_on_normal_inputs(qkv, precision, most, head_size):
    q, k, v = qkv(1, 1, 2304, head_size)
    exact, exact_lse = dense(q, k, v)
    out, lse = dense(q, k, v, precision=precision)
    assert relative(out, exact) <= most
    # Scores err by a relative 1/127 or so; their log-sum over thousands averages that away.
    torch.testing.assert_close(lse, exact_lse, atol=0.02, rtol=0)


def test_a_common_vector_of_all_keys_changes_the_lse_alone(qkv):
    """k + c has the attention of k and a log-sum-exp moved by scale q.c, however large c is."""
    q, k, v = qkv(1, 2, 500, 64)
    c = torch.zeros(64)
    c[::9] = 40.0
    out, lse = dense(q, k, v, precision="int8", scale=SCALE)
    moved_out, moved_lse = dense(q, k + c, v, precision="int8", scale=SCALE)
    assert relative(moved_out, out) < 1e-3
    torch.testing.assert_close(moved_lse, lse + SCALE * (q @ c), atol=2e-3, rtol=1e-5)


def test_rotation_saves_outlier_channels(qkv):
    """Four channels of k twenty times the others: INT8 steps follow them, unless every channel gets a share."""
    q, k, v = qkv(1, 1, 1000, 128)
    k = torch.cat((k[..., :4] * 20, k[..., 4:]), dim=-1)
    scale = 128**-0.5
    exact = torch.softmax(q @ k.mT * scale, dim=-1)

    def error(rotate):
        found_q, found_k, _ = quantize(q, k, v, precision="int8", scale=scale, rotate=rotate).dequantized()
        return relative(torch.softmax(found_q @ found_k.mT * math.log(2), dim=-1), exact)

    assert error(True) < error(False) / 2


def test_refusals(qkv):
    q, k, v = qkv(1, 1, 16, 64)
    with pytest.raises(ValueError, match=r"^precision: 'native'; valid: one of \('int8', 'int8_fp8'\)$"):
        quantize(q, k, v, precision="native", scale=SCALE)
    valid = "'hopper', 'triton', 'host', or None to choose by device"
    with pytest.raises(ValueError, match=rf"^backend: 'cuda'; valid: {valid}$"):
        quantize(q, k, v, precision="int8", scale=SCALE, backend="cuda")


def test_what_the_hopper_pass_does_not_take(qkv):
    def refusal(q, k, v, **settings):
        with pytest.raises(
            ValueError, match=r"^backend: 'hopper', but .*; valid: 'triton', or None to choose$"
        ) as told:
            quantize(q, k, v, precision="int8", scale=SCALE, backend="hopper", **settings)
        return str(told.value).removeprefix("backend: 'hopper', but ").partition(";")[0]

    q, k, v = qkv(1, 2, 16, 64, torch.float16)
    assert refusal(q, k, v, rotate=False) == "it always rotates"
    assert refusal(q, k[:, :, 1:], v[:, :, 1:]) == "there are 16 queries and 15 keys"
    assert refusal(q, k, v.mT.contiguous().mT) == "v does not lie in pieces of 16 bytes"
    assert refusal(*qkv(1, 2, 16, 72, torch.float16)) == "head size 72 is not one of (64, 128)"
    assert quantize_backend(q, k, v) == "host"


def test_columns_of_hopper_products_are_those_that_a_thread_stores():
    """Columns 8 j + 2 t + e of a product, which a thread t has, are columns 16 t + 2 j + e of what is wanted."""
    from sparse_dit.kernels.quantize_hopper import _matrices

    signs, ones = _matrices(torch.float32, torch.device("cpu"))
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))

    def stored(product):
        return rearrange(product, "m (j t e) -> m (t j e)", t=4, e=2)

    left, right = (stored(half @ signs) for half in x.split(64, dim=1))
    torch.testing.assert_close(left / 8, x[:, :64] @ rotation(64))
    torch.testing.assert_close(torch.cat((left + right, left - right), dim=1) * 128**-0.5, x @ rotation(128))
    placed = torch.cat([stored(half.mT @ ones) for half in x.split(64)], dim=1)
    assert placed.equal(rearrange(x, "(n i t e) d -> d (n t i e)", i=2, t=4, e=2))


def check_against_torch(q, k, v, precision, order, rotate, backend="triton"):
    """Triton's codes are torch's to the bit, and off by at most one with rotation, whose sums have no fixed order.

    q, k and v are multiples of 1/8: then means are the same whatever the order of their sums.
    """
    found = quantize(q, k, v, precision=precision, scale=SCALE, order=order, rotate=rotate, backend=backend)
    host = (x.cpu() for x in (q, k, v))
    order = None if order is None else order.cpu()
    expected = quantize(*host, precision=precision, scale=SCALE, order=order, rotate=rotate, backend="host")
    # A single key less the mean of all is nothing but rounding, where it is rotated: codes and their scale say nothing.
    told = ("q",) if rotate and k.shape[2] == 1 else ("q", "k")
    assert k.shape[2] > 1 or (127 * found.k_scale < 1e-5).all()
    for name in told:
        difference = (getattr(found, name).cpu().int() - getattr(expected, name).int()).abs()
        assert difference.max() <= rotate, name
        assert difference.float().mean() < 0.01
    rtol = 1e-5 if rotate else 0
    for name in (f"{name}_scale" for name in told):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=rtol, atol=0)
    torch.testing.assert_close(found.lse_shift.cpu(), expected.lse_shift, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.v.cpu().float(), expected.v.float(), rtol=0, atol=0)
    if precision == "int8_fp8":
        torch.testing.assert_close(found.v_scale.cpu(), expected.v_scale, rtol=0, atol=0)
        torch.testing.assert_close(found.v_mean.cpu(), expected.v_mean, rtol=0, atol=0)


@pytest.fixture
def eighths(qkv):
    """Like qkv, rounded to multiples of 1/8 up to 4."""

    def make(*args, **kwargs):
        return [(x.float() * 8).round().clamp(-32, 32).div(8).to(x.dtype) for x in qkv(*args, **kwargs)]

    return make


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize(
    ("seq", "head_size", "order_heads", "rotate"),
    [(1, 64, 1, False), (129, 64, 0, False), (300, 72, 2, False), (130, 88, 0, True), (70, 128, 1, True)],
)
def test_triton_codes_are_those_of_torch(eighths, exact_fp8, precision, seq, head_size, order_heads, rotate):
    q, k, v = eighths(1, 2, seq, head_size, torch.float16)
    check_against_torch(q, k, v, precision, orders(order_heads, seq) if order_heads else None, rotate)


@pytest.mark.parametrize("rotate", [False, True])
def test_triton_takes_the_widest_heads_and_any_strides(eighths, exact_fp8, rotate):
    q, k, v = eighths(2, 1, 40, 256, torch.float16)
    k = k.mT.contiguous().mT  # channels strided
    check_against_torch(q, k, v.expand(2, 3, -1, -1)[:, :1], "int8_fp8", None, rotate)


@pytest.mark.gpu
class TestCuda:
    @pytest.mark.parametrize(("order_heads", "rotate"), [(0, True), (3, False)])
    @pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
    @pytest.mark.parametrize("head_size", TRITON_HEAD_SIZES)
    @pytest.mark.parametrize("seq", [127, 1000])
    def test_codes(self, eighths, seq, head_size, precision, order_heads, rotate):
        q, k, v = eighths(2, 3, seq, head_size, torch.bfloat16, "cuda")
        order = orders(order_heads, seq, "cuda") if order_heads else None
        check_against_torch(q, k, v, precision, order, rotate)

    @pytest.mark.parametrize("order_heads", [0, 1, 3])
    @pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
    @pytest.mark.parametrize("head_size", HOPPER_QUANTIZED)
    @pytest.mark.parametrize(("batch", "seq"), [(1, 1), (2, 127), (1, 129), (2, 1000)])
    def test_hopper_codes(self, eighths, batch, seq, head_size, precision, order_heads):
        q, k, v = eighths(batch, 3, seq, head_size, torch.bfloat16, "cuda")
        if quantize_backend(q, k, v) != "hopper":
            pytest.skip("needs a Hopper GPU")
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        order = orders(order_heads, seq, "cuda") if order_heads else None
        torch.full((2**24,), torch.nan, device="cuda")  # what fresh memory will hold
        check_against_torch(q, k, v, precision, order, True, "hopper")

    @pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
    @pytest.mark.parametrize("head_size", HOPPER_QUANTIZED)
    def test_hopper_programs_take_several_tiles_each(self, eighths, head_size, precision):
        q, k, v = eighths(1, 40, 2304, head_size, torch.float16, "cuda")
        if quantize_backend(q, k, v) != "hopper":
            pytest.skip("needs a Hopper GPU")
        check_against_torch(q, k, v, precision, None, True, "hopper")

    @pytest.mark.parametrize(("precision", "most"), [("int8", 0.015), ("int8_fp8", 0.04)])
    @pytest.mark.parametrize("head_size", [64, 128])
    def test_error_on_normal_inputs(self, qkv, precision, most, head_size):
        q, k, v = qkv(1, 4, 2304, head_size, torch.bfloat16, "cuda")
        exact, _ = dense(q.float(), k.float(), v.float())
        assert relative(dense(q, k, v, precision=precision)[0], exact) <= most


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("groups", [1, 5, 8, 929])
def test_the_scales_of_values_as_the_hopper_kernel_takes_them_in(groups, device):
    from sparse_dit.kernels.lift_triton import lifts

    scale = torch.rand(2, 3, groups, generator=torch.Generator().manual_seed(groups)) + 0.01
    lift, top = (x.cpu() for x in lifts(scale.to(device)))
    assert torch.equal(top, scale.amax(dim=-1))
    # Two roundings of fp32, of the quotient and of a sum of up to 8.
    torch.testing.assert_close(lift, (scale / top[..., None]).log2() + 8, atol=2e-6, rtol=0)
    assert lift.max() == 8
