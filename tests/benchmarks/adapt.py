"""What a few labels of one's own are worth: one state's photos as "own", the rest as the bundle.

    python tests/benchmarks/adapt.py --data DIR --backbone-weights FILE --cache-dir DIR

Tas and Vic in turn are left out of a bundle (recipe `quick`, then `linear`), which is then adapted to 5, 10
and 20 of their photos: whole sampling dates at random until there are as many, the last date in part. All are
scored on the photos of the dates that were not touched: the bundle alone; adapted, by the rule of
`training.own`, which was fixed before the first run (the bundle as it is where the rule says so); and a
head of the same kind that learned from the own photos alone. `error_g` is the root of the mean weighted
squared error over photos, with the weights of the official score; a weighted R2 of so few photos has little
to divide by.
adapt.csv beside this file holds what this writes.
"""
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from real_photos import RealPhotos

from biomass_kit.data.table import read_train
from biomass_kit.data.targets import TARGETS, WEIGHTS, weighted_r2
from biomass_kit.inference.bundle import read_bundle
from biomass_kit.inference.members import head_class
from biomass_kit.inference.physics import apply_physics, training_bounds
from biomass_kit.inference.pooled import photo_groups
from biomass_kit.training.batches import one_thread
from biomass_kit.training.config import TrainConfig
from biomass_kit.training.member import closed_options
from biomass_kit.training.own import Adapter, Head, judge, own_rows
from biomass_kit.training.recipes import with_recipe
from biomass_kit.training.run import train

CSV = Path(__file__).with_name("adapt.csv")


@dataclass(frozen=True)
class Args(RealPhotos):
    "The learning curve of adapting."

    out: Path = CSV
    recipes: tuple[str, ...] = ("quick", "linear")
    states: tuple[str, ...] = ("Tas", "Vic")
    labels: tuple[int, ...] = (5, 10, 20)
    draws: int = 30


def without_state(data: Path, state: str, out: Path) -> Path:
    "The data folder without one state's photos."
    rows = pd.read_csv(data / "train.csv")
    rows = rows[rows["State"] != state]
    for name in rows["image_path"].unique():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data / name, out / name)
    rows.to_csv(out / "train.csv", index=False)
    return out


# (numbers of own photos, numbers of the photos to score)
def draw(dates: np.ndarray, labels: int, rng) -> tuple:
    "Whole dates at random until there are as many photos, the last one in part."
    order = rng.permutation(np.unique(dates))
    photos = np.concatenate([rng.permutation(np.flatnonzero(dates == date)) for date in order])
    own = photos[:labels]
    return own, np.flatnonzero(~np.isin(dates, dates[own]))


def own_alone(head: Head, config: TrainConfig, adapter: Adapter, own, asked) -> np.ndarray:
    "What a head of the same kind says that learned from the own photos alone, [n, 5] grams."
    alone = head_class(config.head)(head.model.args["dims"], **closed_options(config))
    rows = head.own[head.learned][:, own].flatten(0, 1)
    views = len(head.learned)
    grams = torch.tensor(adapter.grams[own], dtype=torch.float32)
    alone.fit(rows, grams.repeat(views, 1), np.tile(adapter.groups[own], views))
    raw = torch.stack([alone(head.own[v][asked][:, None, None]) for v in head.asked]).mean(0).numpy()
    return apply_physics(
        raw, training_bounds(adapter.grams[own]), config.physics, config.correction_threshold)


def subset(bundle, rows: list, table: pd.DataFrame, own: np.ndarray, asked: np.ndarray) -> Adapter:
    "An adapter of all photos of the state, own ones first."
    order = np.concatenate([own, asked])
    grams = table[list(TARGETS)].to_numpy()[order]
    return Adapter(bundle, [each[:, order] for each in rows], grams, photo_groups(table).numpy()[order])


def scored(whole: Adapter, own: int, bundle, rows, table, numbers, config) -> list:  # of (way, grams, weight)
    "The three ways on the photos that were not touched."
    asked = np.arange(own, len(whole.grams))
    grams = table[list(TARGETS)].to_numpy()[numbers]
    mine = Adapter(bundle, [each[:, numbers] for each in rows], grams, photo_groups(table).numpy()[numbers])
    verdict = judge(mine)
    weight = verdict.weight if verdict.helps else 0.0
    adapted = whole.before[asked]
    first = np.arange(own)
    if weight: adapted = whole.finished(whole.predict(first, weight, whole.photos[asked]), first)
    alone = own_alone(whole.heads[0], config, whole, first, asked)
    return [
        ("bundle alone", whole.before[asked], np.nan), ("adapted", adapted, weight),
        ("own alone", alone, np.nan)]


def one_state(a: Args, table, recipe: str, state: str, work: Path) -> list:  # of rows
    "The curve of one state, and the bundle that never saw it."
    known = without_state(a.data, state, work / "data")
    base = TrainConfig(**a.options() | {"data": known, "out": work / "run"})
    config = with_recipe(base, recipe)
    train(config, log=print)
    bundle = read_bundle(config.out)
    own = table[table["State"] == state].reset_index(drop=True)
    rows = own_rows(bundle, list(own["path"]), device_type="cpu", cache_dir=a.cache_dir)
    with one_thread(), torch.no_grad():
        return curve(a, bundle, rows, own, config, {"recipe": recipe, "state": state})


def main():
    a = tyro.cli(Args)
    table = read_train(a.data)
    found = []
    for recipe in a.recipes:
        for state in a.states:
            with tempfile.TemporaryDirectory() as work:
                found += one_state(a, table, recipe, state, Path(work))
    scores = pd.DataFrame(found)
    scores.to_csv(a.out, index=False, float_format="%.4f")
    print(scores.groupby(["recipe", "state", "labels", "way"], sort=False)[["error_g", "weighted_r2"]].mean())


def curve(a: Args, bundle, rows, table, config, facts: dict) -> list:  # of rows
    "All draws of one state."
    found = []
    dates = table["Sampling_Date"].to_numpy()
    for labels in a.labels:
        for number in range(a.draws):
            own, asked = draw(dates, labels, np.random.default_rng([number, labels]))
            if not len(asked): continue
            whole = subset(bundle, rows, table, own, asked)
            y = whole.grams[labels:]
            for way, grams, weight in scored(whole, labels, bundle, rows, table, own, config):
                error = np.sqrt((((y - grams) ** 2) @ np.asarray(WEIGHTS)).mean())
                found.append(facts | {
                    "labels": labels, "draw": number, "dates": len(set(dates[own])), "scored": len(asked),
                    "way": way,
                    "weight": weight, "error_g": error, "weighted_r2": weighted_r2(y, grams)})
    return found


if __name__ == "__main__": main()
