"""The hold-out of all recipes as README shows it, from the scores of every split.

    python tests/benchmarks/holdout.py

holdout.csv holds what `biomass_holdout` wrote as scores.csv for two ranges of seeds, on the 80 photos:

    biomass_holdout --data DIR --out OUT --backbone vit_small_patch14_dinov2 --backbone-weights FILE
        --tile-size 252 --device-type cpu --recipes neural plan default quick linear stacked probe
        --first-seed 0
    (and --first-seed 1000)
"""
from pathlib import Path

import pandas as pd

from biomass_kit.evidence.splits import holdout_table

SCORES = Path(__file__).with_name("holdout.csv")
RANGES = {"chosen on": range(30), "reported once on": range(1000, 1030)}


def markdown(
    scores: pd.DataFrame,  # rows as from `splits.score_row`
    baseline: str,  # the recipe that the others are compared with
    first: str,  # name of the first column
) -> list:  # of lines
    "Scores of recipes as a table in Markdown, the best first."
    columns = [first, "weighted R²", "sd", f"minus {baseline}", "won", "dead", "clover"]
    found = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in holdout_table(scores, baseline).itertuples():
        ends = f"{row.difference:+.3f} ({row.difference_low:+.3f} to {row.difference_high:+.3f})"
        apart = ["", ""] if row.recipe == baseline else [ends, f"{row.won:.0%}"]
        cells = [row.recipe, f"{row.mean:.3f}", f"{row.sd:.3f}", *apart,
                 f"{row.Dry_Dead_g_r2:.2f}", f"{row.Dry_Clover_g_r2:.2f}"]
        found.append(f"| {' | '.join(cells)} |")
    return found


def lines(baseline: str = "neural") -> list:
    "The tables of both ranges."
    scores = pd.read_csv(SCORES)
    found = []
    for what, seeds in RANGES.items():
        some = scores[scores["seed"].isin(seeds)]
        if some.empty: continue
        found += [*markdown(some, baseline, f"{what} seeds {seeds[0]} to {seeds[-1]}"), ""]
    return found[:-1]


if __name__ == "__main__": print(*lines(), sep="\n")
