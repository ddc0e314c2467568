"""The examples of the pages run, and do what the pages say of them."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_dit.app.cli import COMMANDS, read_command

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]


def run_page(name: str) -> dict[str, Any]:
    """Runs the Python examples of a page in one namespace, in the order in which they stand."""
    text = (DOCS / name).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert blocks, f"{name} has no example"
    namespace: dict[str, Any] = {}
    for block in blocks:
        # Blank lines in front, so that errors name the line of the page.
        lines = text[: text.index(block)].count("\n")
        exec(compile("\n" * lines + block, str(DOCS / name), "exec"), namespace)
    return namespace


def test_the_page_on_models_of_your_own(capsys: pytest.CaptureFixture[str]) -> None:
    page = run_page("own-model.md")
    dense, sparse, recipe = page["dense"], page["sparse"], page["recipe"]
    assert sparse.shape == dense.shape == (1, 607, 128)
    assert 0 < (dense - sparse).abs().mean() < dense.abs().mean()

    # The first search is exact; the one in step 3 goes by the log-sum-exp that the first one kept.
    calls, (q, k, v) = page["calls"], (page["q"], page["k"], page["v"])
    assert [call.whole for call in calls] == [True, False, False, False, False]
    torch.testing.assert_close(calls[0].out, scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)
    assert all(0 < float(call.density) < 0.5 for call in calls)
    assert "step 0: whole attention, the first search" in capsys.readouterr().out

    # What the page says beside its examples.
    with pytest.raises(ValueError, match=r"\[B, H, 607, D\]"):
        page["sparse_attention"](q[:, :, 1:], k, v, grid=page["GRID"], text_after=page["TEXT"], recipe=recipe)
    asked = q.clone().requires_grad_()
    out = page["sparse_attention"](asked, k, v, grid=page["GRID"], text_after=page["TEXT"], recipe=recipe)
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()
    disabled = torch.compiler.disable(page["sparse_attention"])

    def compiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return disabled(q * 1, k, v, grid=page["GRID"], text_after=page["TEXT"], recipe=recipe) * 1

    torch.testing.assert_close(torch.compile(compiled, backend="eager")(q, k, v), out.detach())


def test_the_page_on_serving_engines() -> None:
    """Called as the dispatcher of vllm-omni #4493 calls a plug-in: tokens first, settings by name."""
    page = run_page("serving.md")
    call = page["sparse_dit_attention"]
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5 * 8 * 6, 2, 32)
    whole = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.2).transpose(1, 2)
    # Per-sample tensors [samples, 3], as `PerForwardState` there documents them.
    told = {
        "latent_shape": torch.tensor([[5, 16, 12]] * 2),
        "patch_size": torch.tensor([[1, 2, 2]] * 2),
        "total_denoise_steps": torch.tensor([50, 50]),
    }
    settings = {"is_causal": False, "softmax_scale": 0.2}
    early = call(q, k, v, {**told, "denoise_step_idx": torch.tensor([3, 3])}, **settings)
    torch.testing.assert_close(early, whole)
    torch.testing.assert_close(call(q, k, v, {}, **settings), whole)
    sparse = call(q, k, v, {**told, "denoise_step_idx": torch.tensor([30, 30])}, **settings)
    own = page["sparse_attention"](
        *(x.transpose(1, 2) for x in (q, k, v)), grid=(5, 8, 6), recipe=page["RECIPE"], scale=0.2
    )
    assert torch.equal(sparse, own.transpose(1, 2))
    assert sparse.shape == q.shape
    assert (sparse - whole).abs().max() > 1e-3
    with pytest.raises(ValueError, match="valid: "):
        call(q[:, :100], k[:, :100], v[:, :100], told, **settings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("name: mine\nselection: radial\n")
    text = page.read_text()
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        for line in re.findall(r"^(?:\.venv/bin/)?sparse-dit (.*)$", block.replace("\\\n", " "), flags=re.MULTILINE):
            read_command(shlex.split(line))
    for words in re.findall(r"`sparse-dit ([^`]+)`", text):
        assert {" ".join(words.split()[:count]) for count in (1, 2)} & COMMANDS.keys(), words
    for module in re.findall(r"-m (sparse_dit[\w.]*)", text):
        assert find_spec(module), module


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
