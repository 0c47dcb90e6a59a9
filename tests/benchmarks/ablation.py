"""What each large step of the recipe `default` does on dates never seen: each row changes one thing.

    python tests/benchmarks/ablation.py --data DIR --backbone-weights FILE --cache-dir DIR

Each row is trained and scored on the same splits as `biomass_holdout` does it; the command goes on where it
stopped, and ablation.csv holds what it wrote as scores.csv. The rule, written before the first look: a row
moves a default only if it wins 80 % of the splits.
"""
import os
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from real_photos import RealPhotos

from biomass_kit.command import command
from biomass_kit.data.files import write_csv
from biomass_kit.data.progress import progress, say
from biomass_kit.evidence.holdout import Contender, Study, run_study
from biomass_kit.evidence.splits import holdout_lines, holdout_table
from biomass_kit.training.config import TrainConfig, check_config
from biomass_kit.training.recipes import TWO_GRIDS, recipe, recipe_runs

DEFAULT = "default"
PLANNED = {k: v for k, v in recipe("plan").values.items() if k != "freeze_backbone"}
# row -> what differs from the recipe `default`
ROWS = {
    DEFAULT: {},
    "class and mean token alone": dict(pooling="cls_mean"),
    "last block": dict(feature_blocks=(1.0,)),
    "learned from all photos": dict(learn_from="all"),
    "roots instead of logs": dict(link="sqrt", log_targets="all"),
    "head as first planned": PLANNED,
    "no MixUp, no CutMix": dict(use_mixup=False, use_cutmix=False),
    "no flips, no swap": dict(augment="none", swap_prob=0.0, tta=("plain",)),
    "state, month, species heads": dict(use_aux_heads=True),
    "NDVI and height heads": dict(use_aux_values=True),
    "3x3 tiles beside, read together": dict(also=("grid=3x3",)),
}
GRIDS = "3x3 tiles beside, averaged"  # the one row of two runs


@dataclass(frozen=True)
class Args(RealPhotos):
    "Compare large steps."

    out: Path = Path("runs/ablation")
    rows: tuple[str, ...] = (*ROWS, GRIDS)
    splits: int = 15
    first_seed: int = 0
    processes: int = 0  # 0 is one per core


def contenders(a: Args) -> dict:  # row -> Contender
    "The recipe's runs, changed."
    base = TrainConfig(**a.options(), out=Path("unused"))
    changed = {row: [values] for row, values in ROWS.items()} | {GRIDS: list(TWO_GRIDS)}
    (plain,) = recipe_runs(base, DEFAULT)
    runs = {row: [check_config(replace(plain, **values)) for values in changed[row]] for row in a.rows}
    return {row: Contender(configs) for row, configs in runs.items()}


@command
def main(args=None):
    "Train and score the rows."
    a = tyro.cli(Args, args=args)
    seeds = tuple(range(a.first_seed, a.first_seed + a.splits))
    study = Study(contenders(a), seeds, a.out)
    scores = run_study(study, a.processes or os.cpu_count(), progress, say)
    write_csv(a.out / "scores.csv", scores)
    print(*holdout_lines(holdout_table(scores, DEFAULT)), sep="\n")


if __name__ == "__main__": main()
