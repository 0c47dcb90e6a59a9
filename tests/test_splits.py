"""Recipes compared on random splits by date: who is held out, and what the scores allow to be said."""
import importlib.util

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sources import ROOT

from biomass_kit.data.folds import floor_predictions
from biomass_kit.data.targets import TARGETS, BiomassError, per_target_scores, weighted_r2
from biomass_kit.evidence.splits import (
    date_split,
    floor_scores,
    holdout_lines,
    holdout_table,
    nadeau_bengio,
    plot_holdout,
    score_row,
    split_scores,
    splits,
)

SIZES = {"train_photos": 20, "test_photos": 10}


def labels(states, photos=3):
    "A table of a date for each state named, some photos each."
    days = pd.date_range("2015-03-01", periods=len(states), freq="9D").repeat(photos)
    green, dead, clover = np.random.default_rng(0).gamma(2, 10, (3, len(days)))
    grams = np.stack([green, dead, clover, green + clover, green + dead + clover], 1)
    table = pd.DataFrame(grams, columns=list(TARGETS))
    return table.assign(Sampling_Date=days, State=np.repeat(states, photos))


def scored(marked="", **recipes):
    "Rows of scores from recipe -> the weighted R2 of seeds 0, 1, ...; None where a seed was not scored."
    own = {f"{t}_{name}": 0.25 for t in TARGETS for name in ("r2", "rmse_g", "sd_g")}
    return pd.DataFrame([
        {"recipe": recipe, "seed": seed, "weighted_r2": r2, **own, **SIZES, "marked": marked}
        for recipe, values in recipes.items() for seed, r2 in enumerate(values) if r2 is not None])


def test_a_split_that_takes_a_whole_state_is_kept_and_marked():
    table = labels(["Tas"] * 6 + ["WA", "NSW"])
    found = splits(table, range(40))
    for split in found:
        lost = [s for s in ("NSW", "WA") if split.held_out[table["State"] == s].all()]
        assert split.marked == (f"no photo of {', '.join(lost)} is left to train on" if lost else "")
    assert {""} < {split.marked for split in found}


def test_scores_are_those_of_the_held_out_photos():
    table = labels(["Tas", "Vic", "WA"] * 3)
    split = date_split(table, 1)
    measured = table.loc[split.held_out, list(TARGETS)].to_numpy()
    off = measured + 1
    own = split_scores(table, split, off)
    assert own["weighted_r2"] == weighted_r2(measured, off)
    assert own["per_target"] == per_target_scores(measured, off)
    row = score_row("mine", table, split, off)
    assert row["GDM_g_r2"] == own["per_target"]["GDM_g"]["r2"]
    assert row["Dry_Dead_g_rmse_g"] == pytest.approx(1)
    assert (row["train_photos"], row["test_photos"]) == (18, 9)
    with pytest.raises(BiomassError, match="rows"): split_scores(table, split, measured[:-1])


def test_floors_are_fitted_on_the_training_part():
    table = labels(["Tas", "Vic", "WA"] * 3)
    split = date_split(table, 4)
    rows = floor_scores(table, split)
    assert [row["recipe"] for row in rows] == ["floor_constant", "floor_state"]
    for row in rows:
        due = floor_predictions(table, split.held_out.astype(int), row["recipe"])[split.held_out]
        assert row == pytest.approx(score_row(row["recipe"], table, split, due))


def test_the_correction_adds_the_ratio_of_the_sizes():
    d = np.random.default_rng(2).normal(0.03, 0.05, 12)
    told = nadeau_bengio(d, [20, 30] * 6, [10, 10] * 6, level=0.8)
    # ratios 1/2 and 1/3 are 5/12 on average, and 1/12 + 5/12 is a half
    half = stats.t.ppf(0.9, 11) * d.std(ddof=1) * np.sqrt(0.5)
    assert (told["low"], told["high"]) == pytest.approx((d.mean() - half, d.mean() + half))
    assert told["p"] == pytest.approx(2 * stats.t.sf(abs(d.mean()) / d.std(ddof=1) / np.sqrt(0.5), 11))


@pytest.mark.parametrize("d", [[0.1, float("nan")], [float("inf"), 0.1], [float("nan")], []])
def test_differences_that_are_none_are_refused(d):
    with pytest.raises(BiomassError, match="give a finite one"): nadeau_bengio(d, 20, 10)


def test_the_table_compares_in_pairs_and_counts_a_tie_half():
    scores = scored(base=[0.5, 0.4, 0.6, 0.5], better=[0.6, 0.5, 0.6, 0.4], worse=[0.1, 0.2, 0.3, 0.4])
    table = holdout_table(scores, "base").set_index("recipe")
    assert list(table.index) == ["better", "base", "worse"]
    assert table["won"].to_dict() == {"better": 0.625, "base": 0.5, "worse": 0}
    told = nadeau_bengio([0.1, 0.1, 0, -0.1], 20, 10)
    ends = ["difference", "difference_low", "difference_high"]
    assert tuple(table.loc["better", ends]) == pytest.approx((told["mean"], told["low"], told["high"]))
    assert table.loc["base", ends].tolist() == [0, 0, 0]
    own = nadeau_bengio([0.1, 0.2, 0.3, 0.4], 20, 10)
    assert tuple(table.loc["worse", ["mean", "mean_low", "mean_high"]]) == pytest.approx(
        (own["mean"], own["low"], own["high"]))
    assert table.loc["worse", "sd"] == pytest.approx(np.std([0.1, 0.2, 0.3, 0.4], ddof=1))
    assert set(table["splits"]) == {4} and set(table["left_out"]) == set(table["marked"]) == {0}


def test_only_splits_that_all_have_are_compared():
    scores = scored("WA is lost", base=[0.5, 0.4, 0.6, 0.9, None], other=[0.6, None, 0.6, 0.5, 0.1])
    table = holdout_table(scores.sample(frac=1, random_state=1), "base").set_index("recipe")
    assert set(table["splits"]) == {3} and set(table["left_out"]) == {2} and set(table["marked"]) == {3}
    assert table["mean"].to_dict() == pytest.approx({"base": 2 / 3, "other": 1.7 / 3})
    assert table.loc["other", "difference"] == pytest.approx(-0.1)
    lines = holdout_lines(holdout_table(scores, "base"))
    assert lines[0].startswith("3 splits ") and "left out: 2 splits that not every recipe has" in lines
    assert lines[2].startswith("marked: 3 splits")


def test_a_target_that_does_not_vary_in_a_split_counts_by_its_errors_alone():
    scores = scored(base=[0.5, 0.4])
    scores.loc[0, ["Dry_Dead_g_r2", "Dry_Dead_g_rmse_g", "Dry_Dead_g_sd_g"]] = [np.nan, 1.0, 0.0]
    scores.loc[1, ["Dry_Dead_g_r2", "Dry_Dead_g_rmse_g", "Dry_Dead_g_sd_g"]] = [0.75, 1.0, 2.0]
    assert holdout_table(scores, "base")["Dry_Dead_g_r2"].tolist() == [1 - (1 + 1) / 4]


def test_a_targets_score_is_that_of_all_splits_as_one():
    table = labels(["Tas", "Vic", "NSW"] * 4)
    grams = table[list(TARGETS)].to_numpy() + np.random.default_rng(1).normal(0, 5, (len(table), 5))
    rows = [score_row("noisy", table, split, grams[split.held_out]) for split in splits(table, range(3))]
    found = holdout_table(pd.DataFrame(rows), "noisy").loc[0]
    errors, spread = 0, 0
    for split in splits(table, range(3)):
        y = table.loc[split.held_out, list(TARGETS)].to_numpy()
        errors = errors + ((grams[split.held_out] - y) ** 2).sum(0)
        spread = spread + ((y - y.mean(0)) ** 2).sum(0)
    assert np.allclose(found[[f"{t}_r2" for t in TARGETS]].astype(float), 1 - errors / spread)


def test_scores_read_back_from_a_file_make_the_same_table(tmp_path):
    scores = scored(base=[0.5, 0.4, 0.1], other=[0.6, 0.5, 0.7])
    scores.to_csv(tmp_path / "scores.csv", index=False)
    again = holdout_table(pd.read_csv(tmp_path / "scores.csv"), "base")
    pd.testing.assert_frame_equal(again, holdout_table(scores, "base"))


def test_one_split_has_a_difference_and_no_interval():
    scores = scored(base=[0.5], other=[0.6])
    table = holdout_table(scores, "base")
    assert table["difference"].tolist() == pytest.approx([0.1, 0])
    assert table[["sd", "mean_low", "mean_high", "difference_low", "difference_high"]].isna().to_numpy().all()
    text = "\n".join(holdout_lines(table))
    assert text.startswith("1 split ") and "+0.100" in text and "(" not in text and "nan" not in text
    assert len(plot_holdout(scores, "base").axes) == 1


@pytest.mark.parametrize("scores, said", [
    (scored(mine=[0.5]), "baseline base: .*choose of mine"),
    (pd.concat([scored(base=[0.5])] * 2), "recipe base, seed 0 is there a second time"),
    (scored(base=[0.5, float("nan")]), "recipe base, seed 1 has a weighted R2 that is NaN or infinite"),
    (scored(base=[0.5], mine=[0.5]).assign(test_photos=[10, 11]), "recipe mine, seed 0 .*same data"),
    (scored(base=[0.5, None], mine=[None, 0.5]), "no seed that every recipe has")])
def test_scores_that_cannot_be_paired_are_refused(scores, said):
    with pytest.raises(BiomassError, match=said): holdout_table(scores, "base")


def test_the_picture_has_a_row_for_each_other_recipe():
    scores = scored(base=[0.5, 0.4, 0.6], other=[0.6, 0.5, 0.5], third=[0.1, 0.2, 0.3])
    ax = plot_holdout(scores, "base").axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["other", "third"]
    assert [t.get_text() for t in ax.texts] == ["67% won", "0% won"]
    dots = [np.sort(c.get_offsets()[:, 0]) for c in ax.collections if len(c.get_offsets()) == 3]
    np.testing.assert_allclose(dots, [[-0.1, 0.1, 0.1], [-0.4, -0.3, -0.2]])


def test_the_readme_shows_the_committed_hold_out():
    path = ROOT / "tests" / "benchmarks" / "holdout.py"
    spec = importlib.util.spec_from_file_location("holdout_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "\n".join(module.lines()) in (ROOT / "README.md").read_text(encoding="utf-8")
