"""Tensors in, tensors out: block-sparse attention that knows no model and no recipe. `ops` is the door.

This folder shares its name with a Hugging Face package that transformers looks for. Python started in the repository's
root finds this folder first, so under that name it steps aside: the real package is loaded in its place. Where there is
none, this stays a module without a version, which transformers takes for "not installed"; an ImportError here would
stop its own import.
"""

if __name__ == "kernels":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry or ".").resolve() != _root])
    if _spec is not None and _spec.loader is not None:
        sys.modules[__name__] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
