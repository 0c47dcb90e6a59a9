"""How far half precision moves predictions of real photos.

    python tests/benchmarks/precision.py --weights RUN --photos DIR

Each precision twice: with weights held in it, as predictions are made, and in fp32 under autocast, as they
were made before. Without a GPU a matrix product takes inputs rounded to half precision, adds up in fp32 and
rounds its result, as a GPU's does; the CPU's own kernels for half precision are too slow.
"""
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch.overrides import TorchFunctionMode

from biomass_kit.data.photos import list_photos
from biomass_kit.data.targets import TARGETS
from biomass_kit.features.runner import HALVES
from biomass_kit.inference.bundle import read_bundle
from biomass_kit.inference.ensemble import Ensemble

PRODUCTS = F.linear, F.conv2d, F.scaled_dot_product_attention


@dataclass(frozen=True)
class Args:
    "Compare predictions in half precision with those in fp32."

    weights: Path  # a trained run or bundle
    photos: Path  # folder of photos
    count: int = 20  # photos, evenly spread over the folder
    precisions: tuple[str, ...] = tuple(HALVES)
    device_type: str = "auto"


class RoundedProducts(TorchFunctionMode):
    "Products in half precision with sums in fp32: of all tensors under autocast, else of those in it."

    def __init__(self, dtype: torch.dtype, autocast: bool):
        super().__init__()
        self.dtype, self.autocast = dtype, autocast

    def __torch_function__(self, function, types, args=(), kwargs=None):
        first = args[0] if args else None
        if function not in PRODUCTS or not (self.autocast or first.dtype == self.dtype):
            return function(*args, **(kwargs or {}))
        wide = [a.to(self.dtype).float() if isinstance(a, torch.Tensor) else a for a in args]
        named = {k: a.to(self.dtype).float() if isinstance(a, torch.Tensor) else a
                 for k, a in (kwargs or {}).items()}
        return function(*wide, **named).to(self.dtype)


def in_half(bundle, device: str, precision: str, autocast: bool) -> tuple:
    "An ensemble in half precision, and the context in which it predicts."
    on_cpu = device == "cpu"
    rounded = RoundedProducts(HALVES[precision], autocast) if on_cpu else nullcontext()
    with rounded: ensemble = Ensemble(bundle, device_type=device, precision=precision)
    if not autocast: return ensemble, rounded
    exact = Ensemble(bundle, device_type=device, precision="fp32")
    for key, runner in ensemble.runners.items():
        runner.backbone = exact.backbones[key]
        if on_cpu: runner.precision = "fp32"  # the context rounds
    return ensemble, rounded


def differences(found: np.ndarray, due: np.ndarray) -> dict:
    "Of [n, 5] grams: the largest, the root mean square, and that as a share of the spread over photos."
    rms = np.sqrt(np.square(found - due).mean())
    return {"largest": np.abs(found - due).max(), "rms": rms, "share": rms / np.sqrt(due.var(0).mean())}


def some_photos(folder: Path, count: int) -> list:
    "Photos evenly spread over a folder."
    paths = list_photos(folder)
    return [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, count).round().astype(int))]


def main():
    a = tyro.cli(Args)
    bundle, paths = read_bundle(a.weights), some_photos(a.photos, a.count)
    exact = Ensemble(bundle, device_type=a.device_type, precision="fp32")
    device = exact.device.type
    print(f"{len(bundle.members)} members, {len(paths)} photos, {device}, {platform.machine()}, "
          f"torch {torch.__version__}, {date.today()}")
    due = exact.predict(paths, num_workers=0)
    widest = due.std(0).argmax()
    print(f"largest prediction {due.max():.1f} g, spread {due.std(0)[widest]:.1f} g of {TARGETS[widest]}")
    for precision in a.precisions:
        for form, autocast in (("weights held in it", False), ("autocast", True)):
            start = time.perf_counter()
            ensemble, rounded = in_half(bundle, device, precision, autocast)
            with rounded: found = ensemble.predict(paths, num_workers=0)
            off, seconds = differences(found, due), time.perf_counter() - start
            print(f"  {precision} {form:18s} largest {off['largest']:.4f} g, root mean square "
                  f"{off['rms']:.4f} g, {off['share']:.2%} of the spread ({seconds:.0f} s)", flush=True)


if __name__ == "__main__": main()
