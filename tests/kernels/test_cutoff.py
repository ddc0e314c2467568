"""The largest of a pool up to a count or a sum: the kernels and the torch path against sorting by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_dit.kernels import cutoff_triton
from sparse_dit.kernels.cutoff import take_mass, torch_take_mass
from sparse_dit.kernels.cutoff_triton import triton_take_count, triton_take_mass

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(seed: int, *shape: int, ties: bool) -> Tensor:
    """Numbers of both signs, with many equal ones where there are ties; -0 among them."""
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(-3, 3, shape, generator=generator).float().neg().to(DEVICE)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def best_by_hand(scores: Tensor, budget: int, excluded: Tensor) -> Tensor:
    """Of one pool [rows, columns]: the first `budget` of what is left, and the first of each row."""
    left = [
        (-value, row, column)
        for row, values in enumerate(scores.tolist())
        for column, value in enumerate(values)
        if not excluded[row, column]
    ]
    firsts = [next((one for one in sorted(left) if one[1] == row), None) for row in range(len(scores))]
    taken = torch.zeros(scores.shape, dtype=torch.bool)
    for _, row, column in [*sorted(left)[:budget], *(one for one in firsts if one)]:
        taken[row, column] = True
    return taken


@settings(max_examples=8, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 40)),
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    left_out=st.sampled_from(["none", "single", "columns"]),
    bits=st.sampled_from([4, 5]),
)
def test_a_count_takes_the_best_of_a_pool(
    shape: tuple[int, int, int], seed: int, ties: bool, left_out: str, bits: int
) -> None:
    scores = drawn(seed, *shape, ties=ties)
    size = shape if left_out == "single" else (1, 1, shape[2])
    excluded = torch.rand(size, generator=torch.Generator().manual_seed(seed + 1)).to(DEVICE) < 0.2
    excluded = None if left_out == "none" else excluded
    budget = 1 + seed % (shape[1] * shape[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutoff_triton, "TILE", 128)
        patch.setattr(cutoff_triton, "CHUNK", 64)
        patch.setattr(cutoff_triton, "BITS", bits)
        found = triton_take_count(scores, torch.full(shape[:1], budget, device=DEVICE) if ties else budget, excluded)
    out = torch.zeros_like(scores, dtype=torch.bool) if excluded is None else excluded.expand(shape)
    for pool in range(shape[0]):
        assert torch.equal(found[pool].cpu(), best_by_hand(scores[pool].cpu(), budget, out[pool].cpu()))


def mass_by_hand(gates: Tensor, own: Tensor, threshold: float) -> Tensor:
    """Of one pool, in plain numbers."""
    low, high = float(gates.min()), float(gates.max())
    share = [(x - low) / (high - low) if high > low else 1.0 for x in gates.double().flatten().tolist()]
    order = sorted(range(len(share)), key=lambda i: (not bool(own.flatten()[i]), -share[i], i))
    taken, before = own.flatten().clone(), 0.0
    for i in order:
        taken[i] |= before < threshold * sum(share)
        before += share[i]
    return taken.view(gates.shape)


@pytest.mark.parametrize("compute", [torch_take_mass, triton_take_mass], ids=["torch", "triton"])
@settings(max_examples=6, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 40)),
    seed=st.integers(0, 2**20),
    threshold=st.sampled_from([0.1, 0.25, 0.7, 0.95]),
    shared=st.booleans(),
)
def test_mass_takes_own_gates_and_the_largest(
    compute: object, shape: tuple[int, int, int], seed: int, threshold: float, shared: bool
) -> None:
    gates = drawn(seed, *shape, ties=False)
    size = (1, *shape[1:]) if shared else shape
    own = torch.rand(size, generator=torch.Generator().manual_seed(seed + 1)).to(DEVICE) < 0.1
    found = compute(gates, own, threshold)  # type: ignore[operator]
    for pool in range(shape[0]):
        mine = own[0 if shared else pool].cpu()
        assert torch.equal(found[pool].cpu(), mass_by_hand(gates[pool].cpu(), mine, threshold))


@pytest.mark.parametrize("compute", [torch_take_mass, triton_take_mass], ids=["torch", "triton"])
def test_equal_gates_are_taken_as_they_stand(compute: object) -> None:
    gates = torch.ones(1, 3, 4, device=DEVICE)
    own = torch.zeros(1, 3, 4, dtype=torch.bool, device=DEVICE)
    own[0, 2, 3] = True
    # Twelve shares of 1: half of their sum is the own one and the first five.
    found = compute(gates, own, 0.5)  # type: ignore[operator]
    assert found.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 11]


def test_bad_arguments_are_refused() -> None:
    gates, own = torch.zeros(2, 3, 4), torch.zeros(1, 3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^gates: torch.float64 \[2, 3, 4\]; valid: torch.float32 \[pools, rows"):
        take_mass(gates.double(), own, 0.5)
    with pytest.raises(ValueError, match=r"^own: torch.bool \[1, 3, 3\] on cpu; valid: torch.bool \[2 or 1, 3, 4\]"):
        take_mass(gates, own[..., :3], 0.5)
    for threshold in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"^threshold: .*; valid: a share in \(0, 1\]$"):
            take_mass(gates, own, threshold)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(12, 512, 60), (3, 929, 929)])
def test_many_numbers_on_a_gpu(shape: tuple[int, int, int]) -> None:
    gates = drawn(0, *shape, ties=False)
    own = torch.rand((1, *shape[1:]), device="cuda", generator=torch.Generator("cuda").manual_seed(1)) < 0.02
    assert torch.equal(triton_take_mass(gates, own, 0.25), torch_take_mass(gates, own, 0.25))
    found = triton_take_count(gates, shape[1] * shape[2] // 4, None)
    kth = gates.flatten(1).topk(shape[1] * shape[2] // 4, dim=1).values.amin(dim=1)[:, None, None]
    assert torch.equal(found, (gates >= kth) | (gates == gates.amax(dim=-1, keepdim=True)))
