"""Fine-tuning against frozen features on the same folds by date: one command for a machine with a GPU.

    python tests/benchmarks/finetune.py --data DIR --backbone-weights FILE --work DIR [--seeds 0 1 2]

Each row is a `biomass_train` of its own, some at once; a seed also names the folds. The same command goes on
where it was stopped, so a short lease is enough for a part. One table at the end: weighted R2 out of fold.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "import sys; from biomass_kit.train import main; sys.exit(main())"


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
    out = a.work / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    words = ["--data", a.data, "--out", out, "--backbone", a.backbone, "--tile-size", a.tile_size,
             "--backbone-weights", a.backbone_weights, "--seed", seed, "--fold-seed", seed,
             "--num-workers", a.num_workers, "--cache-dir", a.work / "cache", *rows(a)[name]]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", TRAIN, *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path})
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
