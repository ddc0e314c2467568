"""Two processes share a transformer through diffusers' parallelism, and make what one makes.

Run as a program this file is one of the two: it runs all cases and writes what it found.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
import torch.distributed as dist
from diffusers.hooks import tensor_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig, TensorParallelConfig
from torch.distributed.device_mesh import init_device_mesh

from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.families import FAMILIES
from sparse_dit.pipelines.patch import disable, enable, summary
from sparse_dit.profiles import Model, Pattern, Profile
from sparse_dit.state import UNASKED

PROCESSES = 2
EPS = torch.finfo(torch.float32).eps
GRID = (3, 10, 8)
IMAGE = (10, 14)


class Subject(NamedTuple):
    """A model with four heads and two self-attention layers, and the arguments of a forward."""

    model: Any
    arguments: dict[str, Any]


def wan(heads: int = 4) -> Subject:
    """No text in the self-attention; its plan shares the tokens at the first block."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=heads, attention_head_dim=24, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    text = torch.randn(1, 8, 16)
    return Subject(model, {"hidden_states": torch.randn(1, 4, *GRID), "encoder_hidden_states": text, "timestep": 500.0})


def flux() -> Subject:
    """Text in front of the image, each shared by itself; the second layer has them joined."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    arguments = {
        "hidden_states": torch.randn(1, IMAGE[0] * IMAGE[1], 4),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": 0.5,
        "img_ids": torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(side)) for side in IMAGE)),
        "txt_ids": torch.zeros(8, 3),
    }
    return Subject(model, arguments)


def flux2() -> Subject:
    """As FLUX.1, with a reference image, which is shared together with the image in front of it."""
    torch.manual_seed(0)
    model = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=16, axes_dims_rope=(8, 8, 8, 8), timestep_guidance_channels=16,
    )  # fmt: skip
    images = [
        torch.cartesian_prod(torch.tensor([image]), *map(torch.arange, sides), torch.tensor([0]))
        for image, sides in ((0, IMAGE), (10, (5, 10)))
    ]
    ids = torch.cat(images)[None]
    arguments = {
        "hidden_states": torch.randn(1, ids.shape[1], 4),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "timestep": 0.5,
        "img_ids": ids,
        "txt_ids": torch.zeros(1, 8, 4),
        "guidance": torch.tensor([4.0]),
    }
    return Subject(model, arguments)


def qwen() -> Subject:
    """Two samples whose text is padded, between text and image, to different lengths."""
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=16, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    arguments = {
        "hidden_states": torch.randn(2, IMAGE[0] * IMAGE[1], 4),
        "encoder_hidden_states": torch.randn(2, 12, 16),
        "encoder_hidden_states_mask": (torch.arange(12) < torch.tensor([9, 5])[:, None]).long(),
        "timestep": 0.5,
        "img_shapes": [[(1, *IMAGE)]] * 2,
    }
    return Subject(model, arguments)


@torch.no_grad()
def run(subject: Subject) -> torch.Tensor:
    """Two steps."""
    outs = []
    for share in (1.0, 0.8):
        level = torch.full((len(subject.arguments["hidden_states"]),), share * subject.arguments["timestep"])
        outs.append(subject.model(**{**subject.arguments, "timestep": level}, return_dict=False)[0])
    return torch.stack(outs)


BLOCKS = {"block_q": 16, "block_k": 16}
POOLED = {"selection": {"name": "pooled", "density": 0.3}, **BLOCKS}
RADIAL = {"selection": {"name": "radial", "density": 0.3}, **BLOCKS}
TILES = {"order": {"name": "tiles", "tile": [1, 4, 4]}, **BLOCKS}
HEADWISE = {"order": {"name": "axes", "axes": ["thw", "hwt", "wht", "htw"]}, **BLOCKS}
MASS = {
    "selection": {"name": "mass", "density": 0.3, "rich_above": 0.4},
    "schedule": {"refresh_steps": [0, 1]},
    **BLOCKS,
}
ULYSSES = {"ulysses_degree": PROCESSES}
TENSOR = {"tp_degree": PROCESSES}


class Case(NamedTuple):
    """A model, how it is shared, a recipe, and what is done besides."""

    make: Callable[[], Subject]
    recipe: Mapping[str, Any]
    config: Mapping[str, Any] = ULYSSES
    after: bool = False
    """Whether the processes share the model after `enable`."""
    compiled: bool = False


def by_profile() -> dict[str, Any]:
    """Every head of a layer another pattern, one computes nothing."""
    patterns = (
        Pattern("all"),
        Pattern("skip"),
        Pattern("diagonal", width=20),
        Pattern("multi_diagonal", width=20),
    )
    profile = Profile(
        method="by hand",
        model=Model("WanTransformer3DModel", 2, 4),
        layout=TokenLayout(GRID),
        block_q=16,
        block_k=16,
        steps=2,
        bins=(0,),
        patterns=patterns,
        pattern=torch.tensor([[[0, 1, 2, 3], [3, 2, 1, 0]]], dtype=torch.uint8),
    )
    path = Path(sys.argv[1]) / f"profile-{os.environ['RANK']}.safetensors"
    profile.save(path)
    return {"selection": {"name": "profile", "file": str(path)}, **BLOCKS}


CASES = {
    "wan radial": Case(wan, RADIAL),
    "wan radial, shared after": Case(wan, RADIAL, after=True),
    "wan radial, ring": Case(wan, RADIAL, {"ring_degree": PROCESSES}),
    "wan hilbert": Case(wan, {**POOLED, "order": {"name": "hilbert"}}),
    "wan tiles, summaries": Case(
        wan, {**TILES, "selection": {"name": "pooled", "tau": 0.5}, "skipped": {"name": "summary"}}
    ),
    "wan heads in orders of their own": Case(
        wan, {**HEADWISE, "selection": {"name": "pooled", "density": 0.3, "adjacent": True}}
    ),
    "wan heads that are compared": Case(wan, MASS),
    "wan heads with one pool": Case(
        wan, {"selection": {"name": "gate", "pool": "all", "spans": 3, "tiles": [2, 2]}, **BLOCKS}
    ),
    "wan profile": Case(wan, {}),
    "wan reuse": Case(
        wan,
        {
            **TILES,
            "selection": {"name": "window", "size": [1, 2, 2], "tile": [1, 4, 4]},
            "schedule": {"refresh_every": 2},
            "skipped": {"name": "reuse"},
        },
    ),
    "wan cache in parts": Case(
        wan,
        {
            **POOLED,
            "order": {"name": "hilbert"},
            "schedule": {"refresh_every": 2, "refresh_growth": 1},
            "skipped": {"name": "reuse", "ratio": False, "summary": True, "part": 4},
        },
    ),
    "wan int8": Case(wan, {**POOLED, "precision": "int8"}),
    "wan compiled": Case(wan, {**POOLED, "order": {"name": "hilbert"}}, after=True, compiled=True),
    "flux radial": Case(flux, RADIAL),
    "flux hilbert": Case(flux, {**POOLED, "order": {"name": "hilbert"}}),
    "flux heads that are compared": Case(flux, MASS),
    "flux2 tiles": Case(flux2, {**POOLED, **TILES}),
    "qwen pooled": Case(qwen, POOLED),
    "qwen compiled": Case(qwen, POOLED, after=True, compiled=True),
    "flux tensor parallel, heads in orders of their own": Case(
        flux, {**HEADWISE, "selection": {"name": "pooled", "density": 0.3}}, TENSOR
    ),
    "flux tensor parallel, heads that are compared": Case(flux, MASS, TENSOR, after=True),
}


def share(model: Any, config: Mapping[str, Any]) -> None:
    """As a user does; diffusers itself would ask for an accelerator, on which alone it differs."""

    def resolve(self: Any, wanted: Any) -> Any:
        tensor = isinstance(wanted, TensorParallelConfig)
        shape, names = ((PROCESSES,), ("tp",)) if tensor else (wanted.mesh_shape, wanted.mesh_dim_names)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        kind = "tensor_parallel_config" if tensor else "context_parallel_config"
        self._parallel_config = ParallelConfig(**{kind: wanted})
        self._parallel_config.setup(dist.get_rank(), PROCESSES, torch.device("cpu"), mesh=mesh)
        return self._parallel_config

    model._resolve_parallel_config = MethodType(resolve, model)
    kind = TensorParallelConfig if "tp_degree" in config else ContextParallelConfig
    model.enable_parallelism(config=kind(**config))


def one_case(case: Case) -> dict[str, Any]:
    subject, recipe = case.make(), case.recipe or by_profile()
    enable(subject.model, recipe, strict=True)
    alone, whole = run(subject), summary(subject.model)
    disable(subject.model)
    stock = run(subject)
    if case.after:
        enable(subject.model, recipe, strict=True)
    share(subject.model, case.config)
    # diffusers' ring needs a dense kernel that the CPU has not.
    rings = "ring_degree" in case.config
    shared = None if case.after or rings else run(subject)
    if not case.after:
        enable(subject.model, recipe, strict=True)
    if case.compiled:
        # diffusers' hooks look up a signature in their first forward, which cannot be traced.
        run(subject)
        enable(subject.model, recipe, strict=True)
        subject.model.compile_repeated_blocks(fullgraph=True, backend="eager")
    together, counts = run(subject), summary(subject.model)
    disable(subject.model)
    return {
        "off": float((together - alone).abs().max() / alone.abs().max()),
        "changed": float((alone - stock).abs().max() / stock.abs().max()),
        "counts": [counts.sparse, counts.dense] == [whole.sparse, whole.dense],
        "sparse": counts.sparse,
        "restored": shared is None or torch.equal(run(subject), shared),
    }


def dense_steps() -> dict[str, Any]:
    """The first of two steps is dense: the user's own way, to the bit."""
    subject = flux()
    share(subject.model, ULYSSES)
    stock = run(subject)
    enable(subject.model, {**RADIAL, "schedule": {"dense_steps": 1}}, strict=True)
    out, counts = run(subject), summary(subject.model)
    return {"equal": [torch.equal(*pair) for pair in zip(out, stock, strict=True)], "dense": counts.dense}


@contextmanager
def row(transformer: str, **changes: Any) -> Any:
    before = FAMILIES[transformer]
    FAMILIES[transformer] = replace(before, **changes)
    try:
        yield
    finally:
        FAMILIES[transformer] = before


def refused(make: Callable[[], Subject], config: Mapping[str, Any] = ULYSSES) -> dict[str, Any]:
    subject = make()
    share(subject.model, config)
    stock = run(subject)
    enable(subject.model, RADIAL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        out = run(subject)
    told = [str(entry.message) for entry in caught if entry.category is RuntimeWarning]
    return {"equal": torch.equal(out, stock), "dense": summary(subject.model).dense, "told": told}


def refusals() -> dict[str, Any]:
    with row("FluxTransformer2DModel", shared=None):
        text = refused(flux)
    with row("FluxTransformer2DModel", spans=()):
        shares = refused(flux)
    heads = refused(lambda: wan(heads=3), {**ULYSSES, "ulysses_anything": True})
    return {"shared_text": text, "unknown_shares": shares, "uneven_heads": heads}


def main() -> None:
    """One of the processes: `RANK` tells which; the argument is a folder."""
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    warnings.simplefilter("ignore", FutureWarning)
    found: dict[str, Any] = {name: one_case(case) for name, case in CASES.items()}
    found |= {"dense steps": dense_steps(), "refusals": refusals()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(processes_find: Callable[[Path], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What each process found."""
    return processes_find(Path(__file__))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_what_one_makes(name: str, found: list[dict[str, Any]]) -> None:
    for case in (told[name] for told in found):
        assert case["off"] <= 32 * EPS
        assert case["changed"] > 1e-3
        assert case["sparse"] > 0
        assert case["counts"]
        assert case["restored"]


def test_dense_steps_are_the_users_own(found: list[dict[str, Any]]) -> None:
    assert [told["dense steps"] for told in found] == 2 * [{"equal": [True, False], "dense": {"dense_steps": 2}}]


def test_calls_that_cannot_be_shared_exactly_stay_dense(found: list[dict[str, Any]]) -> None:
    for told in found:
        for reason, call in told["refusals"].items():
            assert call == {"equal": True, "dense": {reason: 4}, "told": [UNASKED[reason]]}


if __name__ == "__main__":
    main()
