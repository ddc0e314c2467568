"""What a call of attention along block lists allocates, for the error when there is not enough memory."""

from torch import Tensor

from sparse_dit.kernels.quantize import CODE_ALIGN, GROUP, padded

_GIB = 2**30


def call_bytes(q: Tensor, k: Tensor, order: Tensor | None, precision: str, backend: str) -> dict[str, int]:
    """Bytes by purpose that a call allocates on a GPU; scales, means and copies of rows out of line are left out.

    Args:
        q: queries [B, H, Sq, D].
        k: keys [B, H, Sk, D].
        order: as `ops.block_sparse_attention`.
        precision: as there.
        backend: "hopper" or "triton".
    """
    rows_q, rows_k, head_size = q.shape[0] * q.shape[1] * q.shape[2], k.shape[0] * k.shape[1] * k.shape[2], q.shape[3]
    size = q.element_size()
    needed = {"out": rows_q * head_size * size, "lse": rows_q * 4}
    if precision == "native":
        tensors = 0 if order is None else 3 if backend == "hopper" else 2
        return needed | {"q, k and v in order": tensors * rows_k * head_size * size}
    padded_k = k.shape[0] * k.shape[1] * padded(k.shape[2], GROUP)
    codes = (rows_q + padded_k) * padded(head_size, CODE_ALIGN)
    if precision == "int8_fp8":
        return needed | {"codes": codes + padded_k * head_size}
    return needed | {"codes": codes, "v in order": 0 if order is None else rows_k * head_size * size}


def told_shortage(q: Tensor, k: Tensor, order: Tensor | None, precision: str, backend: str) -> str:
    """The line of the error when memory ran out."""
    needed = call_bytes(q, k, order, precision, backend)
    parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in needed.items() if size)
    return (
        f"block_sparse_attention: too little memory on {q.device} for q {list(q.shape)}; needed: about "
        f"{sum(needed.values()) / _GIB:.2f} GiB at once ({parts}), no attention was computed"
    )
