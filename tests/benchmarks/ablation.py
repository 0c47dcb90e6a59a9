"""What every switch does to the score on dates never seen: one table, each row against one default, beside probe and floors.

    python tests/benchmarks/ablation.py --data DIR --backbone-weights FILE [--rows log-all two-part] [--out runs/ablation]

Every row is the mean over seeds; each seed also deals the dates to its 5 folds anew. A row is the mean of the grids' raw
predictions, corrected as the default is. Its difference to the default, and to the linear probe on the same features and
folds, carries a paired bootstrap over dates. Epochs are a fixed schedule. Tile features are computed once (minutes a grid
on two cores); finished runs are not trained again, so the command goes on where it stopped. The rule, written before the
first look: a switch leaves the plan's setting only if its 90 % interval excludes zero.
"""
import json
import platform
import shutil
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean

import numpy as np
import tyro
from tqdm.auto import tqdm

from biomass_kit.cli import command
from biomass_kit.data import file_digest, read_train, write_csv, write_json
from biomass_kit.evidence import linear_probe, nested_stack, paired_difference
from biomass_kit.features import TileSpec, build_backbone
from biomass_kit.folds import FLOORS, floor_predictions, make_folds, read_table
from biomass_kit.physics import METHODS, nested_physics, training_bounds
from biomass_kit.store import FeatureCache, FeatureRequest, store_features
from biomass_kit.targets import TARGETS, BiomassError, combine, weighted_r2
from biomass_kit.train import TrainConfig, config_record, train_runs
from biomass_kit.tta import View

DEFAULT = "default"  # of the table: grams throughout
SWITCHES = {  # row -> what differs from it; trained
    DEFAULT: {},
    "log targets, dead and clover": dict(use_log_targets=True),
    "log targets, all": dict(use_log_targets=True, log_targets="all"),
    "two-part dead and clover": dict(two_part=True),
    "uncertainty": dict(uncertainty=True),
    "MSE": dict(loss_kind="mse"),
    "epsilon-insensitive": dict(loss_kind="epsilon_insensitive"),
    "equal target weights": dict(target_weights="equal"),
    "interval head": dict(interval_head=True),
    "constraint loss 0.1": dict(constraint_weight=0.1),
    "aux heads 0.1": dict(use_aux_heads=True),
    "aux heads 3 5 2": dict(use_aux_heads=True, aux_state_weight=3.0, aux_month_weight=5.0, aux_species_weight=2.0),
    "class teacher": dict(distill_aux=True),
    "no MixUp": dict(use_mixup=False),
    "CutMix of tiles": dict(use_cutmix=True),
    "no stereo swap": dict(swap_prob=0.0),
    "no flips, no swap": dict(augment="none", swap_prob=0.0),
    "EMA": dict(average="ema"),
    "SWA": dict(average="swa"),
    "fusion none": dict(fusion="none"),
    "fusion cross_attention": dict(fusion="cross_attention"),
    "fusion gated": dict(fusion="gated"),
    "swap-symmetric": dict(symmetric=True),
    "density": dict(density=True),
    "TTA plain": dict(tta=("plain",)),
    "TTA all eight": dict(tta=("plain", "h", "v", "h+v", "swap", "h+swap", "v+swap", "h+v+swap")),
    "blocks 6 9 11": dict(feature_blocks=(6, 9, 11)),
}


@dataclass(frozen=True)
class Args:
    "Measure every switch on real photos."

    data: Path  # competition folder
    backbone_weights: Path
    out: Path = Path("runs/ablation")
    backbone: str = "vit_small_patch14_dinov2"
    tile_size: int = 252
    grids: tuple[tuple[int, int], ...] = ((2, 2), (3, 3))
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rows: tuple[str, ...] = tuple(SWITCHES)  # the trained ones; those made of them follow where they can


def plain_features(a: Args, table, grid) -> np.ndarray:
    "Tile features of the plain view, from the cache that training fills."
    backbone, size = build_backbone(a.backbone, a.backbone_weights, a.tile_size)
    spec = TileSpec(*grid, size)
    return store_features(list(table["path"]), FeatureRequest(backbone.eval(), spec, (View(),), FeatureCache(backbone, spec)), progress=tqdm).gather(range(len(table)), View()).numpy()


def switched(row: str) -> dict: return {"use_log_targets": False, **SWITCHES[row]}


def raw_predictions(a: Args, row: str, table) -> dict:
    "grid -> one [N, 5] of raw out-of-fold grams a seed; trains what is not there."
    folder, paths = a.out / row.replace(" ", "-").replace(",", ""), {}
    paths = {(g, s): folder / f"{g[0]}x{g[1]}-{s}.csv" for g in a.grids for s in a.seeds}
    base = TrainConfig(data=a.data, out=folder, backbone=a.backbone, backbone_weights=a.backbone_weights, tile_size=a.tile_size, freeze_backbone=True, device_type="cpu")
    recipe = config_record(replace(base, out=Path(), cache_dir=None, **switched(row))) | {"weights": file_digest(a.backbone_weights), "train.csv": file_digest(a.data / "train.csv")}
    if (held := folder / "recipe.json").exists() and json.loads(held.read_text(encoding="utf-8")) != json.loads(json.dumps(recipe)):
        raise BiomassError(f"{folder}: was measured with another recipe; choose another --out or delete it")
    write_json(held, recipe)
    for (grid, seed), path in tqdm(paths.items(), desc=row, unit="run"):
        if path.exists(): continue
        run = replace(base, out=folder / path.stem, grid=grid, seed=seed, fold_seed=seed, **switched(row))
        train_runs([run], log=lambda line: None)
        write_csv(path, read_table(run.out / "oof.csv"))
        shutil.rmtree(run.out)
    columns = [t + "_raw" for t in TARGETS]
    return {g: [read_table(paths[g, s]).set_index("image_path").loc[table["image_path"], columns].to_numpy() for s in a.seeds] for g in a.grids}


@command
def main(args=None):
    a = tyro.cli(Args, args=args)
    table = read_train(a.data)
    y, dates = table[list(TARGETS)].to_numpy(), table["Sampling_Date"]
    folds = [make_folds(table, seed=seed) for seed in a.seeds]
    bounds = [{k: training_bounds(y[f != k]) for k in np.unique(f)} for f in folds]
    rows, joint, scored = [], {}, {}

    def corrected(raw, method="derive_dead"): return [nested_physics(r, y, f, b, method) for r, f, b in zip(raw, folds, bounds)]

    def say(row, predictions, against=(DEFAULT, "linear probe")):
        "Print and keep a row: mean score, each seed's, and the paired differences that can be taken."
        scores = [weighted_r2(y, p) for p in predictions]
        scored[row] = predictions
        found = {"row": row, "weighted_r2": mean(scores), "seeds": scores}
        found |= {f"minus {other}": paired_difference(y, predictions, scored[other], dates) for other in against if other in scored and other != row}
        rows.append(found)
        tail = "".join(f"   {k} {{difference:+.3f}} [{{interval[0]:+.3f}}, {{interval[1]:+.3f}}]".format(**v) for k, v in found.items() if k.startswith("minus"))
        print(f"{row:34s} {mean(scores):.3f}{tail}", flush=True)
        facts = {"photos": len(table), "dates": int(dates.nunique()), "backbone": a.backbone, "tile_size": a.tile_size, "seeds": a.seeds, "machine": platform.machine(), "date": str(date.today())}
        write_json(a.out / "ablation.json", {**facts, "rows": rows})

    for kind in FLOORS: say(kind, [floor_predictions(table, f, kind) for f in folds], ())
    probes = [[linear_probe(plain_features(a, table, g), table, f) for f in folds] for g in a.grids]
    for g, probe in zip(a.grids, probes): say(f"linear probe {g[0]}x{g[1]}", probe, ())
    say("linear probe", [sum(p) / len(p) for p in zip(*probes)], ())
    for row in a.rows:
        by_grid = raw_predictions(a, row, table)
        joint[row] = [sum(p) / len(p) for p in zip(*by_grid.values())]
        say(row, corrected(joint[row]))
        if row == DEFAULT:
            for g, raw in by_grid.items(): say(f"{g[0]}x{g[1]} alone", corrected(raw))
            for method in METHODS:
                if method != "derive_dead": say(f"physics {method}", corrected(joint[row], method))
    blend = lambda *names: [np.stack(p) for p in zip(*(joint[n] for n in names))]
    if {"log targets, all", DEFAULT} <= set(joint): say("raw + log blend", corrected([p.mean(0) for p in blend(DEFAULT, "log targets, all")]))
    if len(joint) > 2:
        mixed = blend(*joint)
        say("all rows, mean", corrected([p.mean(0) for p in mixed]))
        say("all rows, trimmed", corrected([combine(p, "trimmed") for p in mixed]))
        say("all rows, weighted (nested)", corrected([nested_stack(p, y, f) for p, f in zip(mixed, folds)]))


if __name__ == "__main__": main()
