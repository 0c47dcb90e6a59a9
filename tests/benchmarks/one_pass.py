"""An ensemble at the cost of its distinct backbone passes: plan against naive form and bare backbone.

    python tests/benchmarks/one_pass.py [--backbone NAME --backbone-weights FILE] [--rounds 3]

Ratios of things run in turn in one process, both sides' outputs compared. The naive side is written plainly:
each member decodes and tiles each photo itself, then runs four full forwards (same batch size, same dtype, no
sharing). The floor is the bare backbone on the same tiles, already in memory, once for each distinct pass.
"""
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Optional

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from untrained import untrained_bundle

from biomass_kit.data.photos import list_photos, read_photo, split_pair
from biomass_kit.data.synthetic import write_dataset
from biomass_kit.features.tiles import TileSpec, cut_tiles
from biomass_kit.features.tta import flip_pixels, parse_view
from biomass_kit.inference.bundle import read_bundle
from biomass_kit.inference.ensemble import Ensemble


@dataclass(frozen=True)
class Args:
    "Time the planned ensemble against the naive one and the floor, and as photos and members grow."

    backbone: str = "vit_small_patch14_dinov2"
    backbone_weights: Optional[Path] = None  # random weights without it: the time is the same
    tile_size: int = 112
    photos: int = 8
    height: int = 600  # pixels of the synthetic photos
    batch_size: int = 4
    rounds: int = 3


@torch.inference_mode()
def naive(ensemble: Ensemble, paths, batch_size: int) -> np.ndarray:
    "Every member alone: decode, tile, four forwards of backbone and head."
    total, (h, v) = 0, map(parse_view, "hv")
    for p in ensemble.passes:
        for model in (ensemble.models[i] for i in p.members):
            backbone, out = ensemble.backbones[p.backbone, p.spec.size], []
            for i in range(0, len(paths), batch_size):
                tiles = torch.stack(
                    [cut_tiles(split_pair(read_photo(q)), p.spec) for q in paths[i : i + batch_size]])
                views = [tiles, flip_pixels(tiles, h), flip_pixels(tiles, v), tiles.flip(1)]
                out.append(sum(model(backbone(x)) for x in views) / len(views))
            total = total + torch.cat(out)
    return (total / len(ensemble.models)).numpy()


@torch.inference_mode()
def floor(ensemble: Ensemble, batches):
    "The bare backbones on tiles in memory, once for each distinct pass."
    for by_spec in batches:
        for p in ensemble.passes:
            for _ in p.views: ensemble.backbones[p.backbone, p.spec.size](by_spec[p.spec])


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(sides: dict, rounds: int) -> list:
    "Seconds of every side, one dict a round."
    return [{side: timed(run) for side, run in sides.items()} for _ in range(rounds)]


def compare(name: str, folder: Path, paths, a: Args):
    "One row: outputs compared, backbone passes counted, then the three sides timed in turn."
    ensemble, calls = Ensemble(read_bundle(folder), device_type="cpu"), []
    hooks = [b.register_forward_hook(lambda *_: calls.append(1)) for b in ensemble.backbones.values()]
    planned = ensemble.predict(paths, a.batch_size)
    passes = len(calls) / -(-len(paths) // a.batch_size)
    for hook in hooks: hook.remove()
    plain = naive(ensemble, paths, a.batch_size)
    assert (np.abs(planned - plain) <= 1e-5 * np.abs(plain) + 1e-4).all(), "the plan changed the answer"
    pairs, specs = [split_pair(read_photo(p)) for p in paths], {p.spec for p in ensemble.passes}
    batches = [
        {s: torch.stack([cut_tiles(t, s) for t in pairs[i : i + a.batch_size]]) for s in specs}
        for i in range(0, len(paths), a.batch_size)]
    rounds = in_turn({"plan": lambda: ensemble.predict(paths, a.batch_size), "naive": lambda: naive(
        ensemble, paths, a.batch_size),
                      "floor": lambda: floor(ensemble, batches)}, a.rounds)

    def ratio(top, bottom): return median(r[top] / r[bottom] for r in rounds)

    unplanned = len(ensemble.models) * len(ensemble.views)
    print(f"{name}: {passes:g} backbone passes per photo (naive {unplanned}), "
          f"largest difference {np.abs(planned - plain).max():.1e} g\n"
          f"  naive / plan {ratio('naive', 'plan'):.2f}   plan / floor {ratio('plan', 'floor'):.3f}   "
          f"(plan {median(r['plan'] for r in rounds):.2f} s for {len(paths)} photos)", flush=True)


def line(x, y) -> tuple:
    "Slope, intercept and R2 of a straight line."
    slope, start = np.polyfit(x, y, 1)
    return slope, start, 1 - np.var(y - slope * np.asarray(x) - start) / np.var(y)


def grow_members(work: Path, paths, a: Args, counts=(1, 5, 10, 20)):
    """Time against the number of frozen members of one grid;
    the slope as a share of one backbone pass over the same photos."""
    ensembles = {n: Ensemble(read_bundle(
        untrained_bundle(work / f"m{n}", ((2, 2),), n, False, a.backbone, a.backbone_weights, a.tile_size)),
                             device_type="cpu") for n in counts}
    tiles = torch.stack(
        [cut_tiles(split_pair(read_photo(p)), TileSpec(2, 2, a.tile_size)) for p in paths[: a.batch_size]])
    backbone = next(iter(ensembles[1].backbones.values()))

    @torch.inference_mode()
    def one_pass():
        for _ in range(0, len(paths), a.batch_size): backbone(tiles)

    sides = {"pass": one_pass} | {n: lambda e=e: e.predict(paths, a.batch_size) for n, e in ensembles.items()}
    in_turn(sides, 1)
    rounds = in_turn(sides, 2 * a.rounds + 1)
    times = [median(r[n] for r in rounds) for n in counts]
    slope, _, fit = line(counts, times)
    print(f"members {counts}: {', '.join(f'{t:.2f}' for t in times)} s, R2 of the line {fit:.3f}; "
          f"each further frozen member {slope / median(r['pass'] for r in rounds):.2%} of a backbone pass",
          flush=True)


def grow_photos(work: Path, a: Args, counts=(20, 40, 80, 160)):
    "Time against the number of photos, tiny ViT."
    paths = list_photos(
        write_dataset(work / "many", n_photos=2, n_test=max(counts), height=a.height) / "test")
    ensemble = Ensemble(read_bundle(untrained_bundle(work / "tiny", tile_size=64)), device_type="cpu")
    sides = {n: lambda n=n: ensemble.predict(paths[:n], a.batch_size) for n in counts}
    in_turn(sides, 1)
    rounds = in_turn(sides, a.rounds)
    times = [median(r[n] for r in rounds) for n in counts]
    slope, start, fit = line(counts, times)
    print(f"photos {counts} (tiny ViT): {', '.join(f'{t:.2f}' for t in times)} s, R2 of the line {fit:.4f}, "
          f"{slope * 1e3:.1f} ms a photo, {start:+.2f} s at none", flush=True)


def main():
    a = tyro.cli(Args)
    print(f"{a.backbone}, tiles of {a.tile_size} px, batch {a.batch_size}, {torch.get_num_threads()} "
          f"threads, {platform.machine()}, "
          f"torch {torch.__version__}, {date.today()}")
    with tempfile.TemporaryDirectory() as work:
        work, model = Path(work), (a.backbone, a.backbone_weights, a.tile_size)
        paths = list_photos(
            write_dataset(work / "data", n_photos=2, n_test=a.photos, height=a.height) / "test")
        frozen = untrained_bundle(work / "frozen", ((2, 2), (3, 3)), 5, False, *model)
        compare("frozen, 5 folds x 2 grids x 4 views", frozen, paths, a)
        compare(
            "fine-tuned, 5 members x 4 views", untrained_bundle(work / "tuned", ((2, 2),), 5, True, *model),
            paths, a)

        def size(pattern): return sum(p.stat().st_size for p in frozen.glob(pattern))

        whole = size("member-*") + 10 * size("backbone-*")
        print(
            f"bundle of 10 frozen members: {size('*') / 1e6:.1f} MB, {size('*') / whole:.3f} of ten whole "
            "checkpoints")
        grow_members(work, paths, a)
        grow_photos(work, a)


if __name__ == "__main__": main()
