"""An ensemble at the cost of its distinct backbone passes: plan against the naive form and against the bare backbone.

    python tests/benchmarks/one_pass.py [--backbone NAME --backbone-weights FILE] [--rounds 3]

Ratios of things run in turn in one process, both sides' outputs compared. The naive side is written plainly: each member
decodes and tiles each photo itself, then runs four full forwards (same batch size, same dtype, no sharing). The floor is
the bare backbone on the same tiles, already in memory, once for each distinct pass.
"""
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Optional

import numpy as np
import torch
import tyro

from biomass_kit.bundle import read_bundle, save_backbone, save_member, write_manifest
from biomass_kit.data import list_photos, read_photo, split_pair
from biomass_kit.ensemble import Ensemble
from biomass_kit.features import TileSpec, build_backbone, cut_tiles
from biomass_kit.model import BiomassModel
from biomass_kit.synthetic import write_dataset
from biomass_kit.tta import flip_pixels

GRIDS, FOLDS, VIEWS = ((2, 2), (3, 3)), 5, ["plain", "h", "v", "swap"]


@dataclass(frozen=True)
class Args:
    "Time the planned ensemble against the naive one and the floor."

    backbone: str = "vit_small_patch14_dinov2"
    backbone_weights: Optional[Path] = None  # random weights without it: the time is the same
    tile_size: int = 112
    photos: int = 8
    height: int = 600  # pixels of the drawn photos
    batch_size: int = 4
    rounds: int = 3


def make_bundle(folder, a: Args, fine_tuned: bool) -> Path:
    "A bundle of untrained members: five folds of two grids on one backbone, or five 2x2 members each with its own."
    torch.manual_seed(0)
    backbone, size = build_backbone(a.backbone, a.backbone_weights, a.tile_size, pretrained=a.backbone_weights is not None)
    infos = []
    for grid in GRIDS[:1] if fine_tuned else GRIDS:
        for fold in range(FOLDS):
            if fine_tuned:
                with torch.no_grad(): next(backbone.model.parameters()).add_(1e-3)
            model = BiomassModel(backbone.dim, learning=True)
            model.fit_output(torch.rand(50, 5) * 60)
            infos.append(save_member(folder, model, dict(name=f"{grid[0]}x{grid[1]}-{fold}", fold=fold, backbone=save_backbone(folder, backbone), grid=list(grid),
                                                         tile_size=size, bounds=[[0.0] * 5, [200.0] * 5], means=[20.0] * 5, config={})))
    write_manifest(folder, infos, {"method": "none", "threshold": 0.15}, VIEWS, {})
    return folder


@torch.inference_mode()
def naive(ensemble: Ensemble, paths, batch_size: int) -> np.ndarray:
    "Every member alone: decode, tile, four forwards of backbone and head."
    total = 0
    for member, model in zip(ensemble.bundle.members, ensemble.models):
        backbone, spec, out = ensemble.backbones[member["backbone"]["file"]], TileSpec(*member["grid"], member["tile_size"]), []
        for i in range(0, len(paths), batch_size):
            tiles = torch.stack([cut_tiles(split_pair(read_photo(p)), spec) for p in paths[i : i + batch_size]])
            views = [tiles, flip_pixels(tiles, ensemble.views[1]), flip_pixels(tiles, ensemble.views[2]), tiles.flip(1)]
            out.append(sum(model(backbone(v)) for v in views) / len(views))
        total = total + torch.cat(out)
    return (total / len(ensemble.models)).numpy()


@torch.inference_mode()
def floor(ensemble: Ensemble, batches):
    "The bare backbones on tiles in memory, once for each distinct pass."
    for by_spec in batches:
        for p in ensemble.passes:
            for _ in p.views: ensemble.backbones[p.backbone](by_spec[p.spec])


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(name: str, folder: Path, paths, a: Args):
    "One row: outputs compared, backbone passes counted, then the two or three sides timed in turn."
    ensemble = Ensemble(read_bundle(folder), device_type="cpu")
    calls = []
    hooks = [b.register_forward_hook(lambda *_: calls.append(1)) for b in ensemble.backbones.values()]
    planned = ensemble.predict(paths, a.batch_size)
    passes = len(calls) / -(-len(paths) // a.batch_size)
    for hook in hooks: hook.remove()
    plain = naive(ensemble, paths, a.batch_size)
    assert (np.abs(planned - plain) <= 1e-5 * np.abs(plain) + 1e-4).all(), "the plan changed the answer"
    tiles = [split_pair(read_photo(p)) for p in paths]
    batches = [{s: torch.stack([cut_tiles(t, s) for t in tiles[i : i + a.batch_size]]) for s in ensemble.specs} for i in range(0, len(paths), a.batch_size)]
    sides = {"plan": lambda: ensemble.predict(paths, a.batch_size), "naive": lambda: naive(ensemble, paths, a.batch_size), "floor": lambda: floor(ensemble, batches)}
    rounds = [{side: timed(run) for side, run in sides.items()} for _ in range(a.rounds)]
    ratio = lambda top, bottom: median(r[top] / r[bottom] for r in rounds)
    print(f"{name}: {passes:g} backbone passes a photo (naive {len(ensemble.models) * len(VIEWS)}), largest difference {np.abs(planned - plain).max():.1e} g\n"
          f"  naive / plan {ratio('naive', 'plan'):.2f}   plan / floor {ratio('plan', 'floor'):.3f}   (plan {median(r['plan'] for r in rounds):.2f} s for {len(paths)} photos)", flush=True)


def main():
    a = tyro.cli(Args)
    print(f"{a.backbone}, tiles of {a.tile_size} px, batch {a.batch_size}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as room:
        data = write_dataset(Path(room) / "data", n_photos=2, n_test=a.photos, height=a.height)
        paths = list_photos(data / "test")
        frozen = make_bundle(Path(room) / "frozen", a, fine_tuned=False)
        compare("frozen, 5 folds x 2 grids x 4 views", frozen, paths, a)
        compare("fine-tuned, 5 members x 4 views", make_bundle(Path(room) / "tuned", a, fine_tuned=True), paths, a)
        size = lambda pattern: sum(p.stat().st_size for p in frozen.glob(pattern))
        whole = size("member-*") + 2 * FOLDS * size("backbone-*")
        print(f"bundle of {2 * FOLDS} frozen members: {size('*') / 1e6:.1f} MB, {size('*') / whole:.3f} of ten whole checkpoints")


if __name__ == "__main__": main()
