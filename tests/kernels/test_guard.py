"""The folder's name is also a package's: under that name the folder steps aside."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_in_root(code, *path):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": ":".join(path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_the_other_package_is_loaded_in_our_place(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from kernels.layer import get_kernel\n__version__ = '9.9'\n")
    (tmp_path / "kernels" / "layer.py").write_text("def get_kernel(): return 'theirs'\n")
    assert (
        run_in_root("import kernels; print(kernels.__version__, kernels.get_kernel())", str(tmp_path)) == "9.9 theirs"
    )


def test_our_package_keeps_its_full_name(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '9.9'\n")
    code = "import sparse_dit.kernels, kernels; print(kernels.__version__, sparse_dit.kernels.__name__)"
    assert run_in_root(code, str(tmp_path)) == "9.9 sparse_dit.kernels"


def test_without_the_other_package_nobody_finds_a_version():
    code = "import kernels; print(getattr(kernels, '__version__', None), hasattr(kernels, 'get_kernel'))"
    assert run_in_root(code) == "None False"
