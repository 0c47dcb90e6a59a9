"""What every switch does to the score on dates never seen: one table, each row against one plan, beside probe and floors.

    python tests/benchmarks/ablation.py --data DIR --backbone-weights FILE [--lite-weights FILE] [--rows NAME ...] [--out runs/ablation]
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 tests/benchmarks/ablation.py ...    # the same, members dealt to two cores
    python tests/benchmarks/ablation.py --table    # the committed ablation.json as the README shows it

A row is the mean over seeds, each of which deals the dates to its 5 folds anew, of the mean of the grids' raw predictions,
corrected alike. The row "plan" holds what the project's plan set before anything was measured, and every switch
is measured against it; the row "default" is what biomass_train does when it is asked for nothing, which the rule below made
of it. The differences of a row, to the row that it differs from by its switch alone and to the
linear probe on the same features and folds, carry a paired bootstrap over dates. The bar is taken over every seed with
every deal. Epochs are a fixed schedule. Tile features are computed once; finished runs are not trained again, so the
command goes on where it stopped, and --rows measures some beside the results that --out holds; a row whose base is neither
asked for nor there has no difference. The rule, written before the
first look: a switch leaves the plan's setting only if its 90 % interval excludes zero; what several such switches do together
is the row "default".
"""
import itertools
import json
import platform
import shutil
import sys
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from statistics import mean
from typing import NamedTuple, Optional

import numpy as np
import tyro
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from stored_mixes import MIXES, mixed_predictions

from biomass_kit.command import command
from biomass_kit.data.files import file_digest, write_csv, write_json
from biomass_kit.data.folds import FLOORS, floor_predictions, make_folds, read_table
from biomass_kit.data.table import read_train
from biomass_kit.data.targets import TARGETS, BiomassError, combine, weighted_r2
from biomass_kit.evidence.compare import difference_table, difference_text, paired_difference
from biomass_kit.evidence.probe import linear_probe
from biomass_kit.evidence.stacking import crossfit_stack
from biomass_kit.features.backbone import build_backbone
from biomass_kit.features.store import FeatureCache, FeatureRequest, store_features
from biomass_kit.features.tiles import TileSpec
from biomass_kit.features.tta import View
from biomass_kit.inference.ensemble import is_main_process
from biomass_kit.inference.physics import METHODS, crossfit_physics, training_bounds
from biomass_kit.training.config import TrainConfig, config_record
from biomass_kit.training.run import expand, train_runs

RESULTS = Path(__file__).with_name("ablation.json")
PLAN, DEFAULT, PROBE = "plan", "default", "linear probe"
# where the rule has moved biomass_train's defaults
PLANNED = dict(fusion="film", use_cutmix=False, constraint_weight=0.0, average="none")
GRAMS, LITE = "grams throughout", "EfficientNet-Lite0"
BF16, DRAWS, SMALL = "2x2 in bf16", "2x2 pixel transforms, 8 draws", "1x1@126 frozen"
DEFAULT_BF16 = "default in bf16"
TAUGHT = "taught by the plan"  # marks the row whose teacher is the plan's run of the same grid, seed and deal
DRAWN = dict(precision="bf16", augment="full", stored_draws=8)
DEFAULTS = {name: getattr(TrainConfig, name) for name in PLANNED}
REDUCED = dict(precision="bf16", tile_size=126, augment="flips", epochs=10)
TUNED = REDUCED | dict(freeze_backbone=False, two_stage=True, freeze_epochs=5)


class Switch(NamedTuple):
    "A trained row: the options that differ from the plan's, and the row that it is compared with."
    options: dict
    against: str = PLAN
    grids: tuple = None  # those of the command by default; what changes pixels pays for every tile again
    seeds: int = None  # the first so many, all by default: fine-tuning costs hours without a GPU


SWITCHES = {
    PLAN: Switch({}),
    DEFAULT: Switch(DEFAULTS),
    GRAMS: Switch(dict(use_log_targets=False)),
    "log targets, all": Switch(dict(log_targets="all")),
    "two-part dead and clover": Switch(dict(two_part=True)),
    "uncertainty": Switch(dict(uncertainty=True)),
    "MSE": Switch(dict(loss_kind="mse")),
    "epsilon-insensitive": Switch(dict(loss_kind="epsilon_insensitive")),
    "equal target weights": Switch(dict(target_weights="equal")),
    "constraint loss 0.1": Switch(dict(constraint_weight=0.1)),
    "interval head": Switch(dict(interval_head=True)),
    "aux heads 0.1": Switch(dict(use_aux_heads=True)),
    "aux heads 3 5 2": Switch(
        dict(use_aux_heads=True, aux_state_weight=3.0, aux_month_weight=5.0, aux_species_weight=2.0)),
    "class teacher": Switch(dict(distill_aux=True)),
    "no MixUp": Switch(dict(use_mixup=False)),
    "CutMix of tiles": Switch(dict(use_cutmix=True)),
    "no stereo swap": Switch(dict(swap_prob=0.0)),
    "no flips, no swap": Switch(dict(augment="none", swap_prob=0.0)),
    "EMA": Switch(dict(average="ema")),
    "SWA": Switch(dict(average="swa")),
    "fusion none": Switch(dict(fusion="none")),
    "fusion cross_attention": Switch(dict(fusion="cross_attention")),
    "fusion gated": Switch(dict(fusion="gated")),
    "swap-symmetric": Switch(dict(symmetric=True)),
    "density": Switch(dict(density=True, use_log_targets=False), GRAMS),
    "TTA plain": Switch(dict(tta=("plain",))),
    "TTA all eight": Switch(dict(tta=("plain", "h", "v", "h+v", "swap", "h+swap", "v+swap", "h+v+swap"))),
    "blocks 6 9 11": Switch(dict(feature_blocks=(6, 9, 11))),
    LITE: Switch(dict(backbone="tf_efficientnet_lite0")),
    f"{LITE} {TAUGHT}": Switch(dict(backbone="tf_efficientnet_lite0"), LITE),
    BF16: Switch(dict(precision="bf16"), "2x2 alone", grids=((2, 2),)),
    DRAWS: Switch(DRAWN, BF16, grids=((2, 2),)),
    "2x2 crops, 8 draws": Switch(DRAWN | dict(augment_crop=True), DRAWS, grids=((2, 2),)),
    "2x2 green jitter, 8 draws": Switch(DRAWN | dict(augment_green=True), DRAWS, grids=((2, 2),)),
    DEFAULT_BF16: Switch(DEFAULTS | dict(precision="bf16"), DEFAULT),
    "default, pixel transforms, 8 draws": Switch(DEFAULTS | DRAWN, DEFAULT_BF16),
    SMALL: Switch(REDUCED, None, grids=((1, 1),), seeds=2),
    "1x1@126 two stages": Switch(TUNED, SMALL, grids=((1, 1),), seeds=2),
    "1x1@126 two stages, LoRA": Switch(
        TUNED | dict(lora_rank=8, backbone_lr=3e-4), SMALL, grids=((1, 1),), seeds=2),
}
MADE = {  # rows that are made of trained ones: row -> rows that must be there
    "raw + log blend": (GRAMS, "log targets, all"),
    "all heads, mean": (PLAN, GRAMS), "all heads, trimmed": (PLAN, GRAMS),
    "all heads, weighted (cross-fitted)": (PLAN, GRAMS),
}


@dataclass(frozen=True)
class Args:
    "Measure every switch on real photos."

    data: Optional[Path] = None  # competition folder
    backbone_weights: Optional[Path] = None
    lite_weights: Optional[Path] = None  # of tf_efficientnet_lite0; its rows are left out without it
    out: Path = Path("runs/ablation")
    backbone: str = "vit_small_patch14_dinov2"
    tile_size: int = 252
    grids: tuple[tuple[int, int], ...] = ((2, 2), (3, 3))
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rows: tuple[str, ...] = (*SWITCHES, *MIXES)  # the trained ones; those made of them follow where they can
    table: bool = False  # print the committed table and stop


def config_of(a: Args, row: str) -> TrainConfig:
    "The options of a row; grid, seed and deal of folds are still to be set."
    base = TrainConfig(data=a.data, out=a.out / row.replace(" ", "-").replace(",", ""), backbone=a.backbone,
                       backbone_weights=a.backbone_weights, tile_size=a.tile_size, freeze_backbone=True,
                       device_type="cpu")
    lite = {"backbone_weights": a.lite_weights} if "backbone" in SWITCHES[row].options else {}
    return replace(base, **PLANNED | SWITCHES[row].options, **lite)


def runs_of(a: Args, row: str) -> dict:
    "(seed, deal, grid) -> the config of one run. The default is trained on every deal with every seed: the bar asks for it."
    switch, config = SWITCHES[row], config_of(a, row)
    seeds = a.seeds[: switch.seeds]
    pairs = itertools.product(seeds, seeds) if row == DEFAULT else zip(seeds, seeds)
    dealt = {
        (s, d): expand(replace(config, seed=s, fold_seed=d, out=config.out / f"deal{d}"), switch.grids or a.grids) for s, d in pairs}
    return {(s, d, c.grid): taught(a, row, c) for (s, d), configs in dealt.items() for c in configs}


def taught(a: Args, row: str, c: TrainConfig) -> TrainConfig:
    "The config with the plan's run of the same grid, seed and deal as its teacher, where the row has one."
    return replace(c, teacher=a.out / PLAN / c.out.relative_to(c.out.parents[1])) if row.endswith(TAUGHT) else c


def raw_predictions(a: Args, row: str, table) -> dict:
    "(seed, deal, grid) -> [N, 5] raw out-of-fold grams; trains what is not there."
    configs = runs_of(a, row)
    recipe = config_record(replace(config_of(a, row), out=Path(), cache_dir=None)) | {
        "weights": file_digest(config_of(a, row).backbone_weights),
        "train.csv": file_digest(a.data / "train.csv")}
    held = config_of(a, row).out / "recipe.json"
    if held.exists() and json.loads(held.read_text(encoding="utf-8")) != json.loads(json.dumps(recipe)):
        raise BiomassError(
            f"{held.parent}: was measured with another recipe; choose another --out or delete it")
    if is_main_process(): write_json(held, recipe)
    kept = lambda c: c.out.with_suffix(".csv")
    missing = [c for c in configs.values() if not kept(c).exists()]
    for c, results in zip(missing, train_runs(missing, tqdm if is_main_process() else lambda x, **_: x, log=lambda line: None) if missing else ()):
        write_json(kept(c).with_suffix(".json"), results.get("coverage", {}))
        write_csv(kept(c), read_table(c.out / "oof.csv"))
        if row != PLAN: shutil.rmtree(c.out)  # the plan's runs are teachers
    if not is_main_process(): return {}
    columns = [t + "_raw" for t in TARGETS]
    return {
        run: read_table(kept(c)).set_index("image_path").loc[table["image_path"], columns].to_numpy() for run,
        c in configs.items()}


def coverage(a: Args, row: str) -> dict:
    "Share of measured figures inside a row's 90 % intervals, mean over its runs; empty where the row has none."
    found = [
        json.loads(c.out.with_suffix(".json").read_text(encoding="utf-8")) for c in runs_of(a, row).values()]
    return {k: mean(f[k] for f in found) for k in found[0]}


@cache
def probe_predictions(a: Args, backbone: str, weights: Path, tile_size: int, blocks: tuple, precision: str, grid: tuple, deal: int) -> np.ndarray:
    "[N, 5] out-of-fold grams of the linear probe on the plain view's features, which training has stored already."
    table, (model, size) = read_train(a.data), build_backbone(backbone, weights, tile_size, blocks=blocks)
    spec, precision = TileSpec(*grid, size), "fp32" if precision == "auto" else precision
    request = FeatureRequest(model.eval(), spec, (View(),), FeatureCache(model, spec, None, precision))
    return linear_probe(store_features(list(table["path"]), request, precision=precision).gather(range(len(table)), View()).numpy(),
                        table, make_folds(table, seed=deal))


def probes_of(a: Args, row: str, runs) -> list:
    "For each run of a row the linear probe on the same features, grid and deal of folds."
    c = config_of(a, row)
    return [
        probe_predictions(a, c.backbone, c.backbone_weights, c.tile_size, c.feature_blocks, c.precision, grid, deal) for _, deal, grid in runs]


class Ledger:
    "Scores rows as they come, prints them and keeps them on disk."

    def __init__(self, a: Args, table):
        self.a, self.table, self.rows, self.scored = a, table, [], {}
        self.y, self.dates = table[list(TARGETS)].to_numpy(), table["Sampling_Date"]
        self.folds = {d: make_folds(table, seed=d) for d in a.seeds}
        self.bounds = {
            d: {k: training_bounds(self.y[f != k]) for k in np.unique(f)} for d, f in self.folds.items()}
        self.facts = {"photos": len(table), "dates": int(self.dates.nunique()), "backbone": a.backbone, "tile_size": a.tile_size, "seeds": a.seeds,
                      "machine": platform.machine(), "date": str(date.today())}

    def corrected(self, raw: dict, method: str = "derive_dead") -> dict:
        "(seed, deal) -> consistent grams."
        return {
            (s, d): crossfit_physics(p, self.y, self.folds[d], self.bounds[d], method) for (s, d),
            p in raw.items()}

    def difference(self, first: dict, second: dict) -> dict:
        "The paired difference over the (seed, deal) pairs that both have."
        both = [pair for pair in first if pair in second]
        return paired_difference(self.y, [first[p] for p in both], [second[p] for p in both], self.dates)

    def say(self, row: str, predictions: dict, against: str = None, probe: dict = None, **facts):
        "Print and keep a row: mean score, each pair's, and the paired differences that can be taken."
        scores = [weighted_r2(self.y, p) for p in predictions.values()]
        self.scored[row] = predictions
        found = {"row": row, "weighted_r2": mean(scores), "seeds": scores, **facts}
        if against in self.scored and against != row:
            found |= {"against": against, "difference": self.difference(predictions, self.scored[against])}
        if probe: found["minus_probe"] = self.difference(predictions, probe)
        self.rows.append(found)
        print("   ".join([f"{row:36s} {mean(scores):.3f}",
                          *(f"{k} {difference_text(found[k])}" for k in ("difference", "minus_probe") if k in found)]), flush=True)
        self.write()

    def write(self):
        "Rows measured now take the place of those of the same name in the folder's results; the others stay, if they are of the same photos and features."
        path, alike = self.a.out / RESULTS.name, (
            "photos", "dates", "backbone", "tile_size", "seeds", "machine")
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
        differ = [k for k in alike if k in held and held[k] != json.loads(json.dumps(self.facts[k]))]
        if differ:
            raise BiomassError(
                f"{path}: was measured with another {', '.join(differ)}; choose another --out or delete it")
        rows = {r["row"]: r for r in [*held["rows"], *self.rows]}
        write_json(path, {**held, **self.facts, "rows": list(rows.values())})


def markdown(found: dict) -> str:
    "The table of a results file as the README shows it."
    table = difference_table(found["rows"])
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(table.columns), "|---" * len(table.columns) + "|", *map(line, table.to_numpy())])


def over_grids(of_run: dict) -> dict:
    "(seed, deal) -> mean over the grids that are there."
    pairs = dict.fromkeys((s, d) for s, d, _ in of_run)
    return {
        (s, d): np.mean([p for (s2, d2, _), p in of_run.items() if (s2, d2) == (s, d)], 0) for s, d in pairs}


def bar(ledger: Ledger, default: dict, probes: dict):
    "The default against the best linear probe over every seed with every deal of folds."
    scores = {
        name: mean(weighted_r2(ledger.y, p) for p in of_deal.values()) for name, of_deal in probes.items()}
    best = max(scores, key=scores.get)
    found = paired_difference(ledger.y, list(default.values()), list(probes[best].values()), ledger.dates)
    ledger.facts["bar"] = {"pairs": len(default), "default": mean(weighted_r2(ledger.y, p) for p in default.values()),
                           "probes": scores, "best_probe": best, **found}
    print(
        f"bar: default minus {best} over {len(default)} (seed, deal) pairs: {difference_text(found)}",
        flush=True)


@command
def main(args=None):
    a = tyro.cli(Args, args=args)
    if a.table: return print(markdown(json.loads(RESULTS.read_text(encoding="utf-8"))))
    if not (a.data and a.backbone_weights):
        raise BiomassError("give --data and --backbone-weights, or --table")
    table = read_train(a.data)
    rows = [r for r in a.rows if a.lite_weights or LITE not in r]
    if set(rows) != set(a.rows): print("rows of EfficientNet-Lite0 are left out: no --lite-weights")
    raw = {row: raw_predictions(a, row, table) for row in rows if row in SWITCHES}
    mixed = {
        row: mixed_predictions(a, config_of(a, BF16), row, table, tqdm if is_main_process() else lambda x, **_: x) for row in rows if row in MIXES}
    if is_main_process(): tell(a, Ledger(a, table), raw, mixed)


def tell(a: Args, ledger: Ledger, raw: dict, mixed: dict):
    "Every row, from the predictions of the trained ones."
    diagonal = {(s, s): None for s in a.seeds}
    for kind in FLOORS: ledger.say(kind, {(d, d): floor_predictions(ledger.table, f, kind) for d, f in ledger.folds.items()})
    each = {g: {(d, d): probe_predictions(a, a.backbone, a.backbone_weights, a.tile_size, (), "auto", g, d) for d in a.seeds} for g in a.grids}
    probes = {f"{PROBE} {g[0]}x{g[1]}": p for g, p in each.items()} | {PROBE: {pair: np.mean([p[pair] for p in each.values()], 0) for pair in diagonal}}
    for name, p in probes.items(): ledger.say(name, p)
    joint = {row: over_grids(of_run) for row, of_run in raw.items()}
    on_diagonal = lambda of_pair: {pair: p for pair, p in of_pair.items() if pair in diagonal}
    for row, of_run in raw.items():
        probe = over_grids(dict(zip(of_run, probes_of(a, row, of_run))))
        cover = coverage(a, row)
        ledger.say(row, ledger.corrected(on_diagonal(joint[row])), SWITCHES[row].against, probe, **({"coverage": cover} if cover else {}))
        if row == DEFAULT: bar(ledger, ledger.corrected(joint[row]), probes)
        if row != PLAN: continue
        for g in a.grids:
            ledger.say(f"{g[0]}x{g[1]} alone", ledger.corrected(on_diagonal({(s, d): p for (s, d, h), p in of_run.items() if h == g})), PLAN, each[g])
        for method in METHODS:
            if method != TrainConfig.physics: ledger.say(f"physics {method}", ledger.corrected(on_diagonal(joint[row]), method), PLAN, probes[PROBE])
    for row, of_run in mixed.items(): ledger.say(row, ledger.corrected(over_grids(of_run)), MIXES[row], each[a.grids[0]])
    heads = [r for r in joint if config_of(a, r).backbone == a.backbone and not SWITCHES[r].grids and not set(DEFAULTS) <= set(SWITCHES[r].options)]
    stacked = lambda pair, names: np.stack([joint[n][pair] for n in names])
    combined = {
        "raw + log blend": lambda pair: stacked(pair, MADE["raw + log blend"]).mean(0),
        "all heads, mean": lambda pair: stacked(pair, heads).mean(0),
        "all heads, trimmed": lambda pair: combine(stacked(pair, heads), "trimmed"),
        "all heads, weighted (cross-fitted)": lambda pair: crossfit_stack(stacked(pair, heads), ledger.y, ledger.folds[pair[1]]),
    }
    for row, made in combined.items():
        against = "all heads, mean" if row in ("all heads, trimmed", "all heads, weighted (cross-fitted)") else PLAN
        if set(MADE[row]) <= set(joint): ledger.say(row, ledger.corrected({pair: made(pair) for pair in diagonal}), against, probes[PROBE])


if __name__ == "__main__": main()
