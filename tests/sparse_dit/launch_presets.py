"""Makes attention calls of presets on a GPU that is not there, and prints the kernels of each as a line of JSON.

    python launch_presets.py PRESET...    with tests/kernels on PYTHONPATH

Tensors lie on the CPU and say that they do not; fresh memory is zeros, as nothing writes it, and never used twice.
Calls that come again are then replayed: a last line tells whether the fourth launches what the second did, each kernel
with the same numbers on the same memory. Of `balanced` another one tells it of calls between refreshes.
"""

import ctypes
import json
import sys

import torch
from absent_gpu import launched, places

from sparse_dit.calls import attend, attend_again
from sparse_dit.kernels.replays import Recording, Replays
from sparse_dit.layout import TokenLayout
from sparse_dit.recipe import load_recipe
from sparse_dit.state import Slot

LAYOUT, HEADS, HEAD_SIZE = TokenLayout((6, 16, 16), text_after=20), 4, 128
STEPS = (0, 1, 13)

torch.Tensor.is_cuda = property(lambda x: True)
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.get_device_capability = lambda *_: (9, 0)
held = []


def cleared(allocate):
    def allocate_and_clear(*args, **kwargs):
        fresh = allocate(*args, **kwargs)
        ctypes.memset(fresh.data_ptr(), 0, fresh.untyped_storage().nbytes())
        held.append(fresh)
        return fresh

    return allocate_and_clear


for owner, made in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
    setattr(owner, made, cleared(getattr(owner, made)))


def told():
    """Launches so far; memory by the order in which it is first seen, wherever it is."""
    seen: dict[int, int] = {}
    at = [[seen.setdefault(address, len(seen)) for address in addresses] for addresses in places]
    return [*launched], at


def repeated(recipe):
    """Whether calls of a recipe are replayed, and whether that launches the same."""
    replays, slot, calls = Replays(), Slot(), []
    for step in range(20, 24):
        q, k, v = torch.randn(1, LAYOUT.length, 3 * HEADS, HEAD_SIZE).bfloat16().chunk(3, dim=2)
        launched.clear()
        places.clear()
        options = {"tokens_first": True, "scale": None, "layer": 3, "step": step, "slot": slot}
        done = attend_again(replays, recipe, LAYOUT, q, k, v, **options)
        calls.append((told(), done.backend, done.out.shape, done.out.stride(), type(done.density)))
    kinds = [type(kind) for kind in replays._calls.values()]
    return {"replayed": kinds == [Recording], "alike": calls[1] == calls[3]}


for name in sys.argv[1:]:
    q, k, v = (torch.randn(1, LAYOUT.length, HEADS, HEAD_SIZE).bfloat16().transpose(1, 2) for _ in "qkv")
    recipe, slot = load_recipe(name), Slot()
    for step in STEPS:
        launched.clear()
        done = attend(recipe, LAYOUT, q, k, v, scale=None, layer=3, step=step, slot=slot)
        kernels = [launch["kernel"].removesuffix("_kernel") for launch in launched]
        print(json.dumps({"preset": name, "step": step, "backend": done.backend, "kernels": kernels}))
    print(json.dumps({"preset": name, **repeated(recipe)}))
    if name == "balanced":
        print(json.dumps({"preset": "kept", **repeated(recipe.override({"schedule.refresh_every": 99}))}))
    held.clear()
