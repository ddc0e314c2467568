"""The pass that gathers q, k and v by an order, against indexing."""

import pytest
import torch

from sparse_dit.kernels.gather import gather_tokens, scatter_tokens
from sparse_dit.kernels.gather_triton import triton_gather


def orders(heads, seq, device="cpu"):
    generator = torch.Generator().manual_seed(seq)
    return torch.stack([torch.randperm(seq, generator=generator) for _ in range(heads)]).to(device)


def check(tensors, order):
    found = triton_gather(tensors, order)
    assert len(found) == len(tensors)
    for out, x in zip(found, tensors, strict=True):
        assert torch.equal(out, gather_tokens(x, order))
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("seq", "head_size"), [(1, 64), (63, 72), (130, 128), (100, 256)])
def test_every_token_goes_to_its_place(qkv, seq, head_size, shared, count):
    check(qkv(2, 3, seq, head_size, torch.float16)[:count], orders(1 if shared else 3, seq))


@pytest.mark.parametrize("shared", [True, False])
def test_any_strides(shared):
    """Heads first, a slice of a fused projection, rows between pieces of 16 bytes, channels apart, one head for all."""
    seq = 50
    order = orders(1 if shared else 2, seq)
    fused = torch.randn(2, seq, 3, 2, 64)
    check([fused[:, :, i].transpose(1, 2) for i in range(3)], order)
    check([torch.randn(2, 2, seq, 64), torch.randn(2, 2, seq + 9, 64)[:, :, 9:]], order)
    check([torch.randn(2, 2, seq, 65)[..., 1:], torch.randn(2, 2, 64, seq).transpose(2, 3)], order)
    check([torch.randn(1, 1, seq, 64).expand(2, 2, -1, -1)], order)
    check([torch.randn(2, 2, seq, 64).half()], order.repeat_interleave(2, dim=1)[:, ::2])


@pytest.mark.parametrize("heads", [1, 3])
def test_scattering_is_the_inverse(qkv, heads):
    q, _, _ = qkv(2, 3, 70, 16)
    order = orders(heads, 70)
    assert torch.equal(scatter_tokens(gather_tokens(q, order), order, torch.empty_like(q)), q)


@pytest.mark.gpu
class TestCuda:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("head_size", [64, 72, 88, 96, 128, 256])
    @pytest.mark.parametrize("shared", [True, False])
    def test_every_token_goes_to_its_place(self, qkv, head_size, shared, dtype):
        for seq in (1, 1000):
            check(qkv(2, 3, seq, head_size, dtype, "cuda"), orders(1 if shared else 3, seq, "cuda"))

    def test_offsets_beyond_two_gigabytes(self):
        memory = torch.randn(130, 2**25 // 64, 64, device="cuda", dtype=torch.bfloat16)  # tokens 2^25 elements apart
        check([memory[:, i : i + 1].transpose(0, 1)[None] for i in (0, 1, 2**25 // 64 - 1)], orders(1, 130, "cuda"))
