"""The wheel holds everything and works alone; the folder names of the checkout stand in nobody's way."""

import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPING = {
    package: Path(folder)
    for package, folder in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-dir"
    ].items()
}
ROOMS = ("sparse_dit", "kernels", "pipelines", "eval", "app")


def run_python(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shipped_files() -> set[str]:
    """Names in the wheel of every Python file, recipe, profile, table of tiles and model file in the five folders."""
    names = set()
    for room in ROOMS:
        home = "sparse_dit" if room == "sparse_dit" else f"sparse_dit/{room}"
        for folder, folders, files in os.walk(ROOT / room, followlinks=False):
            folders[:] = [name for name in folders if name != "__pycache__"]
            inside = Path(folder).relative_to(ROOT / room)
            model = room == "pipelines" and inside.parts[:2] == ("tiny_wan", "model")
            names |= {
                (Path(home) / inside / name).as_posix()
                for name in files
                if model or name.endswith((".py", ".yaml", ".safetensors", "py.typed", "tiles.json"))
            }
    return names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the working tree, built from a copy: setuptools packs whatever an earlier build left in `build/`."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    kept = {*ROOMS, "pyproject.toml", "README.md", "LICENSE"}
    shutil.copytree(
        ROOT,
        source,
        symlinks=True,
        ignore=lambda folder, names: set(names) - kept if Path(folder) == ROOT else {"__pycache__"},
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=out)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    assert set(names) == shipped_files()


def test_every_folder_with_code_is_mapped() -> None:
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            if not (ROOT / room / file.relative_to(ROOT / room).parts[0]).is_symlink():
                assert file.parent.relative_to(ROOT) in MAPPING.values(), f"{file.parent} is missing in pyproject.toml"


def test_the_wheel_works_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    code = """
        import importlib, os, pkgutil
        import sparse_dit
        assert sparse_dit.__file__.startswith(os.environ["PYTHONPATH"]), sparse_dit.__file__
        for module in pkgutil.walk_packages(sparse_dit.__path__, "sparse_dit."):
            if module.name.endswith("__main__"):
                continue
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                # The page's own modules need the extra that they are for.
                if error.name != "gradio" or not module.name.startswith("sparse_dit.app.demo."):
                    raise
        for name in sparse_dit.__all__:
            getattr(sparse_dit, name)
        from sparse_dit.recipe import recipe_names
        print(*recipe_names())
    """
    recipes = run_python(code, tmp_path, PYTHONPATH=str(site)).split()
    assert recipes == sorted(file.stem for file in (ROOT / "sparse_dit" / "recipes").glob("*.yaml"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["sparse_dit", "sparse_dit.kernels", "sparse_dit.kernels.ops"])
def test_the_ground_floor_is_light(module: str, tmp_path: Path) -> None:
    loaded = run_python(f"import sys, {module}; print(*sys.modules)", tmp_path).split()
    assert not {"diffusers", "transformers", "gradio", "triton", "jsonargparse"} & set(loaded)


def test_a_checkout_works_uninstalled() -> None:
    """The links make the five folders one package for `python -c`, mypy and import-linter, started in the root."""
    code = """
        import sys
        sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
        import sparse_dit.kernels.ops, sparse_dit.pipelines.patch, sparse_dit.eval.results, sparse_dit.app.output
        print(sparse_dit.kernels.ops.__file__)
    """
    assert Path(run_python(code, ROOT).strip()).resolve() == (ROOT / "kernels" / "ops.py").resolve()


def test_links_lead_to_the_rooms() -> None:
    for room in ROOMS[1:]:
        link = ROOT / "sparse_dit" / room
        assert link.is_symlink()
        assert link.readlink() == Path("..") / room


def test_the_folder_kernels_hides_no_package_of_that_name(tmp_path: Path) -> None:
    """transformers imports Hugging Face's package `kernels`; `python -c` in the root puts our folder first."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("CUDAProperties = 'theirs'\n")
    (package / "layer.py").write_text("where = __name__\n")
    code = """
        import kernels, kernels.layer, sparse_dit.kernels
        assert kernels is not sparse_dit.kernels
        print(kernels.CUDAProperties, kernels.layer.where)
    """
    assert run_python(code, ROOT, PYTHONPATH=str(tmp_path)).split() == ["theirs", "kernels.layer"]


def test_without_that_package_transformers_works_in_the_root() -> None:
    assert (
        run_python("from transformers import T5EncoderModel; print(T5EncoderModel.__name__)", ROOT).strip()
        == "T5EncoderModel"
    )
