"""Out-of-fold scores on real photographs: grids, seeds and a few switches, beside floors and the linear probe.

    python tests/benchmarks/real_photos.py --data DIR --backbone-weights FILE --out runs/real

Every row is the mean over seeds; each seed also deals the dates to its 5 folds anew, since one deal is one draw of luck.
Differences to the probe on the same features and folds carry a paired bootstrap over dates. Tile features are computed once and cached, so only the first call is slow (minutes a grid on two cores).
"""
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import tyro
from tqdm.auto import tqdm

from biomass_kit.cli import command
from biomass_kit.data import read_train, write_json
from biomass_kit.evidence import linear_probe, paired_difference
from biomass_kit.features import FeatureCache, TileSpec, build_backbone, extract_features, pick_device, pick_precision
from biomass_kit.folds import FLOORS, date_interval, floor_predictions, make_folds, read_table
from biomass_kit.targets import TARGETS, weighted_r2
from biomass_kit.train import TrainConfig, join_runs, train
from biomass_kit.tta import View

SWITCHES = {  # name -> what differs from the row "aux heads"
    "aux heads": {},
    "no aux heads": dict(use_aux_heads=False),
    "aux heads, weights 3 5 2": dict(aux_state_weight=3.0, aux_month_weight=5.0, aux_species_weight=2.0),
    "aux heads, no MixUp": dict(use_mixup=False),
}


@dataclass(frozen=True)
class Args:
    "Measure the default recipe on real photos."

    data: Path  # competition folder
    backbone_weights: Path
    out: Path = Path("runs/real")
    backbone: str = "vit_small_patch14_dinov2"
    tile_size: int = 252
    grids: tuple[tuple[int, int], ...] = ((2, 2), (3, 3))
    seeds: tuple[int, ...] = (0, 1, 2)
    switches: tuple[str, ...] = tuple(SWITCHES)


def plain_features(a: Args, table, grid):
    "Tile features of the plain view, from the cache that training filled."
    device = pick_device()
    precision = pick_precision(device)
    backbone, size = build_backbone(a.backbone, a.backbone_weights, a.tile_size)
    backbone.eval().to(device)
    spec = TileSpec(*grid, size)
    return extract_features(list(table["path"]), backbone, spec, [View()], FeatureCache(backbone, spec, precision=precision), precision)[:, 0].numpy()


def run_switch(a: Args, name: str) -> dict:
    "Train all grids and seeds of one switch; out-of-fold tables by grid, and joint, one a seed."
    found = {}
    for seed in a.seeds:
        runs = []
        for grid in a.grids:
            label = f"{grid[0]}x{grid[1]}"
            runs.append(a.out / name.replace(" ", "-").replace(",", "") / f"{label}-seed{seed}")
            base = TrainConfig(data=a.data, out=runs[-1], grid=grid, backbone=a.backbone, backbone_weights=a.backbone_weights,
                               tile_size=a.tile_size, freeze_backbone=True, use_aux_heads=True, seed=seed, fold_seed=seed)
            train(replace(base, **SWITCHES[name]), progress=tqdm, log=tqdm.write)
            found.setdefault(label, []).append(read_table(runs[-1] / "oof.csv"))
        join_runs(runs, runs[0].parent / f"joint-seed{seed}")
        found.setdefault("joint", []).append(read_table(runs[0].parent / f"joint-seed{seed}" / "oof.csv"))
    return found


@command
def main(args=None):
    a = tyro.cli(Args, args=args)
    table = read_train(a.data)
    y, dates = table[list(TARGETS)].to_numpy(), table["Sampling_Date"]
    folds = [make_folds(table, seed=seed) for seed in a.seeds]
    rows = []

    def say(row, predictions, probes=None):
        "Print and keep one row: mean score over seeds, each seed's, and the difference to the probe with its interval."
        scores = [weighted_r2(y, p) for p in predictions]
        found = {"row": row, "weighted_r2": mean(scores), "seeds": scores, "interval_90": [date_interval(y, p, dates) for p in predictions]}
        if probes is not None: found["minus_probe"] = paired_difference(y, predictions, probes, dates)
        rows.append(found)
        tail = "" if probes is None else "  minus probe {difference:+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]".format(**found["minus_probe"])
        print(f"{row:42s} {mean(scores):.3f}  ({' '.join(f'{s:.3f}' for s in scores)}){tail}", flush=True)

    for kind in FLOORS: say(kind, [floor_predictions(table, f, kind) for f in folds])
    found = {name: run_switch(a, name) for name in a.switches}
    probes = {}
    for grid in a.grids:
        features = plain_features(a, table, grid)
        probes[f"{grid[0]}x{grid[1]}"] = [linear_probe(features, table, f) for f in folds]
    probes["joint"] = [sum(p) / len(p) for p in zip(*probes.values())]
    for label, probe in probes.items(): say(f"linear probe {label}", probe)
    for name, by_grid in found.items():
        for label, tables in by_grid.items():
            aligned = [t.set_index("image_path").loc[table["image_path"]] for t in tables]
            say(f"{name} {label}", [t[[n + "_pred" for n in TARGETS]].to_numpy() for t in aligned], probes[label])
    print(write_json(a.out / "real_photos.json", rows))


if __name__ == "__main__": main()
