"""Fine-tuning against frozen features on the same folds by date: one command for a machine with a GPU.

    python tests/benchmarks/finetune.py --data DIR --backbone-weights FILE --work DIR [--seeds 0 1 2]

Each row is a `biomass_train` of its own, some at once; a seed also names the folds. The same command goes on
where it was stopped, so a short lease is enough for a part. One table at the end: weighted R2 out of fold.
"""
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Args:
    "What is trained."

    data: Path  # competition folder
    backbone_weights: Path  # of the backbone
    work: Path  # folder of the runs
    backbone: str = "vit_small_patch14_dinov2"
    tile_size: int = 252
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 20  # of fine-tuning
    freeze_epochs: int = 5  # of these, with the backbone at rest
    at_once: int = 2  # runs
    num_workers: int = 4  # readers of each


def rows(a: Args) -> dict:  # name -> words
    "The options of each row."
    two = ["--recipe", "finetune", "--epochs", a.epochs, "--freeze-epochs", a.freeze_epochs]
    return {
        "two stages": two,
        "two stages, LoRA": [*two, "--lora-rank", 8, "--backbone-lr", 3e-4],
        "neural, one grid": ["--recipe", "neural", "--grid", 2, 2],
        "default": ["--recipe", "default"],
    }


def score(a: Args, name: str, seed: int) -> float:
    "Weighted R2 of a row's out-of-fold predictions."
    work = a.work.resolve()
    out = work / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    words = ["--data", a.data.resolve(), "--out", out, "--backbone", a.backbone, "--tile-size", a.tile_size,
             "--backbone-weights", a.backbone_weights.resolve(), "--seed", seed, "--fold-seed", seed,
             "--num-workers", a.num_workers, "--cache-dir", work / "cache", *rows(a)[name]]
    command = [sys.executable, "-m", "biomass_kit.train", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return json.loads((out / "results.json").read_text())["scores"]["model"]["weighted_r2"]


def main():
    a = tyro.cli(Args)
    jobs = [(name, seed) for seed in a.seeds for name in rows(a)]
    with ThreadPoolExecutor(a.at_once) as pool:
        found = dict(zip(jobs, pool.map(lambda job: score(a, *job), jobs)))
    print(f"| | {' | '.join(f'seed {seed}' for seed in a.seeds)} |\n|{'---|' * (1 + len(a.seeds))}")
    for name in rows(a):
        print(f"| {name} | {' | '.join(f'{found[name, seed]:.3f}' for seed in a.seeds)} |")


if __name__ == "__main__": main()
