"""Ideas of others, each tried on a head in closed form over many hold-outs by date.

    python tests/benchmarks/ideas.py --data DIR --backbone-weights FILE --cache-dir DIR [--first-seed 0]

Every row differs from "plain" in one thing alone. Plain is the recipe `linear` (ridge, every statistic of
two earlier blocks, roots, stored flips) learned from all photos that a split leaves, its predictions cut at
the training part's bounds and otherwise uncorrected. The rule, written before the first look: an idea
becomes an option if it wins at least 80 % of thirty splits and its mean difference is above zero; else it
is not built.

- pseudo-labels: the photos held out are predicted, then learned from with what was predicted, at the weight
  of any photo; they are given without their labels, as a competition gives its test photos.
- dead as a share: the dead column is learned as its share of the total, and multiplied by the predicted
  total.
- half from parts: GDM and total are half their own prediction, half the sum of their parts.
- Tweedie: a generalised linear model of grams with a logarithmic link and the variance of a Tweedie law of
  power 1.5 (zeros and heavy photos alike), per target, its strength chosen by date as the ridge's is.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from real_photos import RealPhotos
from sklearn.linear_model import TweedieRegressor
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from biomass_kit.data.table import read_train
from biomass_kit.data.targets import CLOVER, DEAD, GDM, GREEN, TARGETS, TOTAL
from biomass_kit.evidence.splits import floor_scores, holdout_lines, holdout_table, score_row, splits
from biomass_kit.features.tta import STORED_VIEWS
from biomass_kit.inference.bundle import head_class
from biomass_kit.inference.physics import clamp, training_bounds
from biomass_kit.model.closed import photo_rows
from biomass_kit.training.config import TrainConfig, check_config
from biomass_kit.training.member import closed_options
from biomass_kit.training.recipes import with_recipe
from biomass_kit.training.run import Run
from biomass_kit.training.setup import make_accelerator


@dataclass(frozen=True)
class Args(RealPhotos):
    "Compare ideas."

    out: Path = Path("ideas.csv")  # scores of every split
    recipe: str = "linear"
    splits: int = 30
    first_seed: int = 0


class Photos:
    "Rows, grams and dates of all photos, and heads learned from some of them."

    def __init__(self, config: TrainConfig):
        run = Run(config, make_accelerator(torch.device("cpu"), "fp32"), "fp32", {})
        run.store(lambda x, **_: x, print)
        self.config, self.table = config, run.table
        everybody = range(len(run.table))
        self.views = [
            photo_rows(*(source.stored.gather(everybody, view) for source in run.sources))
            for view in STORED_VIEWS]
        self.dims = [source.backbone.dim for source in run.sources]
        self.dates = run.table["Sampling_Date"].to_numpy()

    def predict(self, fit: np.ndarray, grams: np.ndarray, asked: np.ndarray) -> np.ndarray:
        "Learn from some photos with these grams [len(fit), 5]; predict others, mean over the stored views."
        head = head_class(self.config.head)(self.dims, **closed_options(self.config))
        rows = torch.cat([view[fit] for view in self.views])
        labels = torch.tensor(grams, dtype=torch.float32).repeat(len(self.views), 1)
        head.fit(rows, labels, np.tile(self.dates[fit], len(self.views)))
        with torch.no_grad():
            found = [head(view[asked][:, None, None].expand(-1, 2, 1, -1)) for view in self.views]
        return torch.stack(found).mean(0).numpy()


def pseudo_labels(photos, fit, grams, asked):
    first = photos.predict(fit, grams, asked)
    return photos.predict(np.r_[fit, asked], np.r_[grams, first], asked)


def dead_as_a_share(photos, fit, grams, asked):
    shares = grams.copy()
    total = grams[:, TOTAL].clip(1e-6)
    shares[:, DEAD] = 100 * grams[:, DEAD] / total
    found = photos.predict(fit, shares, asked)
    found[:, DEAD] = found[:, DEAD].clip(0, 100) / 100 * found[:, TOTAL]
    return found


def half_from_parts(photos, fit, grams, asked):
    found = photos.predict(fit, grams, asked)
    found[:, GDM] = (found[:, GDM] + found[:, GREEN] + found[:, CLOVER]) / 2
    found[:, TOTAL] = (found[:, TOTAL] + found[:, GDM] + found[:, DEAD]) / 2
    return found


def tweedie(photos, fit, grams, asked):
    inputs = np.concatenate([view[fit] for view in photos.views])
    labels = np.tile(grams, (len(photos.views), 1))
    groups = np.tile(photos.dates[fit], len(photos.views))
    found = []
    for target in labels.T:
        steps = [("scale", StandardScaler()), ("fit", TweedieRegressor(power=1.5, link="log", max_iter=300))]
        search = GridSearchCV(
            Pipeline(steps), {"fit__alpha": np.logspace(-1, 3, 5)}, cv=GroupKFold(5),
            scoring="neg_mean_squared_error")
        search.fit(inputs, target, groups=groups)
        found.append(np.mean([search.predict(view[asked]) for view in photos.views], 0))
    return np.stack(found, 1)


IDEAS = {
    "plain": lambda photos, fit, grams, asked: photos.predict(fit, grams, asked),
    "pseudo-labels": pseudo_labels,
    "dead as a share": dead_as_a_share,
    "half from parts": half_from_parts,
    "Tweedie": tweedie,
}


def main():
    a = tyro.cli(Args)
    base = TrainConfig(**a.options(), out=Path("unused"))
    photos = Photos(check_config(replace(with_recipe(base, a.recipe))))
    table = read_train(a.data)
    grams = table[list(TARGETS)].to_numpy()
    rows = []
    for split in splits(table, range(a.first_seed, a.first_seed + a.splits)):
        fit, asked = np.flatnonzero(~split.held_out), np.flatnonzero(split.held_out)
        for name, idea in IDEAS.items():
            found = clamp(idea(photos, fit, grams[fit], asked), training_bounds(grams[fit]))
            rows.append(score_row(name, table, split, found))
        rows += floor_scores(table, split)
    scores = pd.DataFrame(rows)
    scores.to_csv(a.out, index=False)
    print(*holdout_lines(holdout_table(scores, "plain")), sep="\n")


if __name__ == "__main__": main()
