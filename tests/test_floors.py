"""Imports point down only, and nobody goes in through the façade."""

import ast
from pathlib import Path

import pytest

import sparse_dit

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file
    for room in ("sparse_dit", "kernels", "pipelines", "eval", "app")
    for file in (ROOT / room).rglob("*.py")
    if not (ROOT / room / file.relative_to(ROOT / room).parts[0]).is_symlink()
)


def test_imports_point_down(monkeypatch: pytest.MonkeyPatch) -> None:
    importlinter = pytest.importorskip("importlinter.cli", reason="a tool of the dev extra")
    monkeypatch.chdir(ROOT)
    assert importlinter.lint_imports(no_cache=True) == 0


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nobody_imports_from_the_facade(file: Path) -> None:
    """`from sparse_dit import enable` inside the package would hide an arrow that points up from the contract above."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "sparse_dit":
            assert not {entry.name for entry in node.names} & set(sparse_dit._HOMES)


def test_the_facade_names_what_it_has() -> None:
    assert set(sparse_dit.__all__) <= set(dir(sparse_dit))
    for name in sparse_dit.__all__:
        assert getattr(sparse_dit, name)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        assert sparse_dit.nothing_of_that_name
