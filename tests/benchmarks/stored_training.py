"""Epochs on stored features against the same epochs with the frozen backbone recomputed.

    python tests/benchmarks/stored_training.py [--backbone NAME --backbone-weights FILE]

Same photos, batches, draws (flips, swap, MixUp's shares are drawn for both; MixUp itself is off, since on
pixels it is another thing than on features) and heads. The stored side runs all its epochs; the recomputed
side runs one epoch of one fold of each grid and is scaled. After that epoch both sides' heads must say the
same.
"""
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import tyro
from safetensors.torch import save_file

from biomass_kit.data.synthetic import write_dataset
from biomass_kit.features.backbone import build_backbone
from biomass_kit.features.tta import View
from biomass_kit.training.batches import epoch_batches
from biomass_kit.training.config import TrainConfig, check_config
from biomass_kit.training.loop import train_step
from biomass_kit.training.member import MemberTrainer, make_optimizer, predict_fold, stages
from biomass_kit.training.run import Run
from biomass_kit.training.setup import make_accelerator


@dataclass(frozen=True)
class Args:
    "Time training on stored features against training with the frozen backbone in the loop."

    backbone: str = "vit_small_patch14_dinov2"
    backbone_weights: Optional[Path] = None  # random weights without it: the time is the same
    tile_size: int = 252
    photos: int = 40
    height: int = 1000
    epochs: int = 50
    folds: int = 5
    grids: tuple[tuple[int, int], ...] = ((2, 2), (3, 3))


def epochs(f: MemberTrainer, n: int) -> float:
    "Seconds of n epochs: batches and steps, nothing else."
    stage = stages(f.config)[0]
    optimizer = make_optimizer(f.model, f.backbone, stage, f.config)
    f.model.train()
    torch.manual_seed(1)
    start = time.perf_counter()
    for e in range(n):
        for batch in epoch_batches(f.dataset, f.fit, e): train_step(f, batch, optimizer, stage)
    return time.perf_counter() - start


def member(run, k, stored):
    "The trainer of fold k, on stored features or on a backbone that runs in the loop."
    sources = [run.sources[0]._replace(stored=stored)]
    return MemberTrainer(k, run.config, run.table, run.fold, sources, run.accelerator, "fp32")


def random_weights(a: Args, work: Path) -> Path:
    "A file of random weights."
    model = build_backbone(a.backbone, tile_size=a.tile_size, pretrained=False)[0].model
    save_file(model.state_dict(), work / "random.safetensors")
    return work / "random.safetensors"


def measure(a: Args, grid: tuple, data: Path, work: Path) -> np.ndarray:  # seconds [3]
    "Stored, recomputed (scaled from an epoch of one fold), and the extraction for the stored side."
    base = check_config(TrainConfig(
        data=data, out=work / f"{grid}", grid=grid, backbone=a.backbone, backbone_weights=a.backbone_weights,
        tile_size=a.tile_size, n_folds=a.folds, freeze_backbone=True, use_mixup=False, use_cutmix=False,
        augment="flips", cache_dir=work / "cache", device_type="cpu"))
    run = Run(base, make_accelerator(torch.device("cpu"), "fp32"), "fp32", {})
    start = time.perf_counter()
    run.store(lambda x, **_: x, print)
    extraction = (time.perf_counter() - start) / 4  # all four views were stored; one is counted
    once, live = member(run, 0, run.stored), member(run, 0, None)
    epochs(once, 1)
    recomputed = epochs(live, 1) * a.epochs * a.folds
    found = [predict_fold(f, f.scored, [View()]) for f in (once, live)]
    difference = np.abs(found[0] - found[1]).max()
    assert difference < 1e-2, f"the two sides trained different heads: {difference} g"
    print(f"grid {grid}: largest difference after an epoch {difference:.1e} g", flush=True)
    stored = sum(epochs(member(run, k, run.stored), a.epochs) for k in range(a.folds))
    return np.array([stored, recomputed, extraction])


def main():
    a = tyro.cli(Args)
    print(f"{a.backbone}, tiles of {a.tile_size} px, {a.photos} photos, {torch.get_num_threads()} threads, "
          f"{platform.machine()}, torch {torch.__version__}, {date.today()}")
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data = write_dataset(work / "data", n_photos=a.photos, n_test=1, height=a.height)
        if a.backbone_weights is None: a = replace(a, backbone_weights=random_weights(a, work))
        stored, recomputed, extraction = sum(measure(a, grid, data, work) for grid in a.grids)
    print(f"{a.epochs} epochs x {a.folds} folds x {len(a.grids)} grids: stored {stored:.1f} s, recomputed "
          f"{recomputed:.0f} s (scaled), {recomputed / stored:.0f} times; with one plain-view extraction "
          f"({extraction:.0f} s) counted in {recomputed / (stored + extraction):.0f} times")


if __name__ == "__main__": main()
