"""Sparse attention under `torch.compile`: one graph for all steps and layers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from sparse_dit.pipelines.patch import disable, enable, summary

SPARSE = {"selection": {"name": "radial", "density": 0.3}, "block_q": 16, "block_k": 16}
PARTLY = {**SPARSE, "schedule": {"dense_steps": 1, "dense_layers": [2]}}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Graphs:
    """A compiler backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def operators(self) -> list[list[str]]:
        """Names of the engine's operators in each graph."""
        names = [[str(node.target) for node in graph.graph.nodes] for graph in self.graphs]
        return [[name.split(".")[1] for name in of_graph if name.startswith("sparse_dit.")] for of_graph in names]


def test_a_compiled_transformer_is_one_graph_for_all_steps(wan: Any, pipe: WanPipeline) -> None:
    expected = wan.generate(enable(pipe, PARTLY, strict=True))
    graphs = Graphs()
    pipe.transformer.compile(fullgraph=True, backend=graphs)
    enable(pipe, PARTLY, strict=True)
    assert torch.equal(wan.generate(pipe), expected)
    # Dynamo traces the hooks as frames of their own.
    assert graphs.operators() == [["begin_forward"], ["attend"] * wan.LAYERS, ["end_forward"]]
    counts = summary(pipe)
    assert counts.dense == {"dense_steps": wan.FORWARDS * wan.LAYERS, "dense_layers": wan.FORWARDS * (wan.STEPS - 1)}


def test_a_wrapped_transformer_survives_functionalisation(wan: Any, pipe: WanPipeline) -> None:
    expected = wan.generate(enable(pipe, PARTLY, strict=True))
    pipe.transformer = torch.compile(disable(pipe).transformer, fullgraph=True, backend="aot_eager")
    enable(pipe, PARTLY, strict=True)
    assert torch.allclose(wan.generate(pipe), expected, atol=1e-5)
    assert summary(pipe).made == wan.CALLS
    assert disable(pipe) is pipe


def test_a_compiled_function_around_a_transformer_is_one_graph(wan: Any) -> None:
    model = enable(wan.transformer(), SPARSE, strict=True)
    expected = wan.forward(model)
    graphs = Graphs()
    compiled = torch.compile(lambda **arguments: model(**arguments), fullgraph=True, backend=graphs)
    assert torch.equal(wan.forward(compiled), expected)
    assert graphs.operators() == [["begin_forward", *["attend"] * wan.LAYERS, "end_forward"]]
    assert summary(model).sparse == 2 * wan.LAYERS


def test_compiled_blocks_share_one_graph(wan: Any) -> None:
    model = wan.transformer(layers=10)
    expected = wan.forward(enable(model, PARTLY, strict=True), 900.0), wan.forward(model, 100.0)
    graphs = Graphs()
    enable(model, PARTLY, strict=True).compile_repeated_blocks(fullgraph=True, backend=graphs)
    assert torch.equal(wan.forward(model, 900.0), expected[0])
    assert torch.equal(wan.forward(model, 100.0), expected[1])
    assert graphs.operators() == [["attend"]]
    assert summary(model).dense == {"dense_steps": 10, "dense_layers": 1}
