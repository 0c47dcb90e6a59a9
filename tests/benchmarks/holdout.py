"""The hold-out of recipes as README shows it, from the scores of every split.

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
RANGES = {"splits that chose": range(30), "splits reported once": range(1000, 1030)}


SHOWN = ("default", "quick", "neural", "probe", "floor_state")


def lines() -> list:
    "The small table of README: some recipes on both ranges of seeds."
    scores = pd.read_csv(SCORES)
    chosen, reported = (
        holdout_table(scores[scores["seed"].isin(seeds)], "neural").set_index("recipe")
        for seeds in RANGES.values())
    columns = ["weighted R²", *RANGES, "minus neural", "won"]
    found = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name in SHOWN:
        row = reported.loc[name]
        ends = f"{row.difference:+.3f} ({row.difference_low:+.3f} to {row.difference_high:+.3f})"
        apart = ["", ""] if name == "neural" else [ends, f"{row.won:.0%}"]
        cells = [name, f"{chosen.loc[name, 'mean']:.3f}", f"{row['mean']:.3f}", *apart]
        found.append(f"| {' | '.join(cells)} |")
    return found


if __name__ == "__main__": print(*lines(), sep="\n")
