"""Which form of a backbone's forward pass is fastest here, each compared with the plain one."""
import copy
import platform
import sys
import time
from dataclasses import dataclass
from datetime import date
from statistics import median

import torch
import tyro

from biomass_kit.features.backbone import build_backbone
from biomass_kit.features.device import autocast, pick_device


@dataclass(frozen=True)
class Args:
    "Time one backbone pass in several forms."

    backbones: tuple[str, ...] = ("vit_small_patch14_dinov2", "tf_efficientnetv2_b0")
    tile_size: int = 224
    tiles: int = 16
    rounds: int = 5


def forms_of(plain, tiles) -> dict:  # name -> (backbone, precision)
    "The forms of a backbone that are compared."
    channels_last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    forms = {"plain": (plain, "fp32"), "channels_last": (channels_last, "fp32"), "bf16": (plain, "bf16")}
    try:
        compiled = torch.compile(copy.deepcopy(plain))
        with torch.inference_mode(): compiled(tiles)
        forms["torch.compile"] = compiled, "fp32"
    except Exception as e:
        print(f"torch.compile: {type(e).__name__}: {str(e).splitlines()[0]}", file=sys.stderr)
    return forms


def main():
    a = tyro.cli(Args)
    device = pick_device()
    print(
        f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, "
        f"{date.today()}")
    for name in a.backbones:
        torch.manual_seed(0)
        plain = build_backbone(name, pretrained=False, tile_size=a.tile_size)[0].eval().to(device)
        shape = a.tiles, 3, a.tile_size, a.tile_size
        tiles = torch.randint(0, 255, shape, dtype=torch.uint8, device=device)
        forms = forms_of(plain, tiles)
        times, out = {n: [] for n in forms}, {}
        for _ in range(a.rounds + 1):
            for n, (run, precision) in forms.items():
                start = time.perf_counter()
                with torch.inference_mode(), autocast(device, precision): out[n] = run(tiles).cpu()
                times[n].append(time.perf_counter() - start)
        first = median(times["plain"][1:])
        for n in forms:
            gap = (out[n] - out["plain"]).abs().max() / out["plain"].abs().max()
            faster = first / median(times[n][1:])
            print(f"  {name:28s} {n:14s} {faster:.2f} times plain's speed, largest relative difference "
                  f"{gap:.1e}", flush=True)


if __name__ == "__main__": main()
