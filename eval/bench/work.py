"""Cases as calls that can be timed: ours and other people's."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_dit.eval.bench.cases import BLOCK_Q, Case
from sparse_dit.eval.bench.clock import Call
from sparse_dit.eval.bench.inputs import Inputs
from sparse_dit.eval.bench.yardsticks import NAMES, yardstick
from sparse_dit.kernels.backends import chosen_backend
from sparse_dit.kernels.lists import top_k_lists
from sparse_dit.kernels.mass import block_mass
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.kernels.pool import block_means
from sparse_dit.kernels.quantize import Quantized, quantize


@dataclass(frozen=True)
class Work:
    """A case on its inputs.

    Args:
        call: what is timed.
        error: the relative L2 error of what it returns for the first input set, or None where none is defined.
        moved: bytes that a call reads and writes at least, or None where that is not what bounds it.
    """

    call: Call
    error: Callable[[], float] | None = None
    moved: int | None = None


def work(case: Case, inputs: Inputs) -> Work:
    """Makes everything of a case that is not to be timed.

    Raises:
        ValueError: our kernel does not take the call.
        Exception: whatever another one raises.
    """
    if case.what == "quantize":
        return _quantize(case, inputs)
    if case.what == "lists":
        return _lists(case, inputs)
    if case.what == "mass":
        return _mass(case, inputs)
    attend = _attention(case, inputs)
    return Work(attend, error=lambda: inputs.error(case, attend(0)))


def _attention(case: Case, inputs: Inputs) -> Callable[[int], Tensor]:
    if case.kernel in NAMES:
        other = yardstick(case, inputs)
        return lambda run: other(*inputs.sets[run % len(inputs.sets)])
    if case.codes:
        return _kernel_alone(case, inputs)
    blocks, order = inputs.blocks(case), inputs.order if case.ordered else None

    def attend(run: int) -> Tensor:
        q, k, v = inputs.sets[run % len(inputs.sets)]
        settings = {"precision": case.precision, "order": order, "backend": case.kernel, "skipped": case.skipped}
        return block_sparse_attention(q, k, v, blocks, **settings)[0]  # type: ignore[arg-type]

    return attend


def _kernel_alone(case: Case, inputs: Inputs) -> Callable[[int], Tensor]:
    """Attention on codes that are there already."""
    blocks, order = inputs.blocks(case), inputs.order if case.ordered else None
    lists = (blocks.indices, blocks.counts)
    dtype = inputs.sets[0][0].dtype
    chosen_backend(*inputs.sets[0], blocks, case.precision, case.kernel)
    codes = [_codes(case, inputs, run) for run in range(len(inputs.sets))]
    if case.kernel == "hopper":
        from sparse_dit.kernels.hopper import hopper_quantized_attention

        return lambda run: hopper_quantized_attention(codes[run % len(codes)], *lists, order, blocks.block_k, dtype)[0]
    if case.kernel == "triton":
        from sparse_dit.kernels.attention_int8 import triton_quantized_attention

        return lambda run: triton_quantized_attention(
            codes[run % len(codes)], *lists, order, blocks.block_q, blocks.block_k, dtype
        )[0]
    from sparse_dit.kernels.host import host_quantized_attention

    return lambda run: host_quantized_attention(codes[run % len(codes)], *lists, blocks.block_q, blocks.block_k, dtype)[
        0
    ]


def _codes(case: Case, inputs: Inputs, run: int) -> Quantized:
    q, k, v = inputs.sets[run % len(inputs.sets)]
    order = inputs.order if case.ordered else None
    return quantize(q, k, v, precision=case.precision, scale=inputs.shape.head_size**-0.5, order=order)


def _quantize(case: Case, inputs: Inputs) -> Work:
    codes = _codes(case, inputs, 0)
    q, k, v = inputs.sets[0]
    made = [codes.q, codes.q_scale, codes.lse_shift, codes.k, codes.k_scale, codes.v, codes.v_scale, codes.v_mean]
    kept = codes.v.data_ptr() == v.data_ptr()
    read = [q, k, *([] if kept else [v]), *([inputs.order] if case.ordered else [])]
    written = [x for x in made if x is not None and not (kept and x is codes.v)]
    return Work(lambda run: _codes(case, inputs, run), moved=sum(x.nbytes for x in (*read, *written)))


def _lists(case: Case, inputs: Inputs) -> Work:
    """The best key blocks of each row by the product of mean query and mean key."""
    keep = max(1, int(case.density * -(-inputs.shape.tokens // case.block_k)))

    def choose(run: int) -> object:
        q, k, _ = inputs.sets[run % len(inputs.sets)]
        scores = torch.einsum("bhid,bhjd->bhij", block_means(q, BLOCK_Q), block_means(k, case.block_k))
        return top_k_lists(scores, keep, block_q=BLOCK_Q, block_k=case.block_k)

    return Work(choose)


def _mass(case: Case, inputs: Inputs) -> Work:
    whole = inputs.blocks(Case("attention", case.kernel, block_k=case.block_k))
    log_sums = [block_sparse_attention(*each, whole)[1] for each in inputs.sets]

    def mass(run: int) -> Tensor:
        q, k, _ = inputs.sets[run % len(inputs.sets)]
        return block_mass(q, k, log_sums[run % len(log_sums)], BLOCK_Q, case.block_k)

    return Work(mass, error=lambda: inputs.mass_error(case.block_k, mass(0), log_sums[0]))
