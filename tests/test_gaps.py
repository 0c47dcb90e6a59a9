"""Training on tables with gaps: what nobody weighed is masked, and what a score rests on is told."""
import numpy as np
import pandas as pd
import pytest
from commands import command
from safetensors.numpy import load_file

from biomass_kit.data.files import read_json
from biomass_kit.data.folds import read_table
from biomass_kit.data.table import read_train
from biomass_kit.data.targets import KG_HA, TARGETS, kg_per_ha
from biomass_kit.inference.bundle import read_bundle

QUADRAT = ("50", "50")
WIDE = ("Foto", "Datum", "Gruen", "Tot", "Klee", "Weide")


@pytest.fixture(scope="module")
def labels(data): return read_train(data)


def sheet(data, folder, labels, columns, **changes):
    "The photos of `data` with a table of one's own: German, kg DM/ha, some columns."
    per_ha = kg_per_ha(labels[list(TARGETS)].to_numpy(), (50, 50))
    table = pd.DataFrame({
        "Foto": labels["photo"], "Datum": labels["Sampling_Date"].dt.strftime("%d.%m.%Y"),
        **dict(zip(("Gruen", "Tot", "Klee"), per_ha.T)), "Weide": labels["State"] + "1"})
    folder.mkdir()
    (folder / "fotos").symlink_to(data / "train")
    table.assign(**changes)[list(columns)].to_csv(folder / "proben.csv", sep=";", decimal=",", index=False)
    return folder


def options(weights, tmp_path, *more):
    return ("--backbone", "test_efficientnet", "--backbone-weights", weights, "--tile-size", 64,
            "--freeze-backbone", "--n-folds", 3, "--cache-dir", tmp_path / "cache", "--device-type", "cpu",
            "--quadrat-cm", *QUADRAT, "--unit", "kg_ha", *more)


NAMED = ("green=Gruen", "dead=Tot", "clover=Klee", "date=Datum")
HEADS = {
    "neural": ("--epochs", 2, "--use-aux-heads", "--two-part", "--uncertainty", "--interval-head",
               "--no-use-cutmix", "--distill-aux"),
    "ridge": ("--head", "ridge", "--physics", "project"),
    "gaussian_process": ("--head", "gaussian_process"),
}


def trained(folder, out, weights, tmp_path, *more):
    done = command("train", "--data", folder, "--out", out, *options(weights, tmp_path, *more))
    assert done.returncode == 0, done.stderr
    return done, read_json(out / "results.json"), read_table(out / "oof.csv")


@pytest.mark.parametrize("head", HEADS)
def test_a_target_partly_missing(data, labels, weights, tmp_path, head):
    "Clover, and so GDM and total, are unknown for every fourth photo: scores say on how many they rest."
    clover = kg_per_ha(labels["Dry_Clover_g"].to_numpy(), (50, 50))
    clover[::4] = np.nan
    folder = sheet(data, tmp_path / "own", labels, WIDE, Klee=clover)
    out = tmp_path / "run"
    done, results, oof = trained(folder, out, weights, tmp_path, "--columns", *NAMED, *HEADS[head])
    known = len(labels) - len(labels[::4])
    counts = dict(zip(TARGETS, (30, 30, known, known, known)))
    assert results["labels"] == counts
    assert sum(r["labels"] for r in results["per_fold"]) == sum(counts.values())
    told = f"labels that scores rest on, of 30 photos: Dry_Green_g 30, Dry_Dead_g 30, Dry_Clover_g {known}"
    assert told in done.stdout
    assert f"Dry_Clover_g {known}" in (out / "report.html").read_text(encoding="utf-8")
    assert np.isfinite(oof[[t + "_pred" for t in TARGETS]].to_numpy()).all()
    assert oof["Dry_Clover_g"].isna().sum() == len(labels[::4])
    for s in results["scores"].values(): assert np.isfinite(s["weighted_r2"])
    assert not read_bundle(out).unlabelled
    photos = command("predict", "--weights", out, "--photos", folder, "--out", tmp_path / "grams.csv",
                     "--no-report", "--no-cache", "--device-type", "cpu")
    assert photos.returncode == 0, photos.stderr
    assert pd.read_csv(tmp_path / "grams.csv")[list(KG_HA)].notna().all(axis=None)


@pytest.mark.parametrize("head", HEADS)
def test_a_target_that_nobody_weighed(data, labels, weights, tmp_path, head):
    "Green and clover alone: GDM is implied, dead and total are not; nothing is said of them anywhere."
    folder = sheet(data, tmp_path / "own", labels, ("Foto", "Datum", "Gruen", "Klee"))
    out, named = tmp_path / "run", ("green=Gruen", "clover=Klee", "date=Datum")
    done, results, oof = trained(folder, out, weights, tmp_path, "--columns", *named, *HEADS[head])
    assert results["labels"] == dict(zip(TARGETS, (30, 0, 30, 30, 0)))
    assert list(results["physics"]) == ["none"]
    assert "no photo has a label of Dry_Dead_g, Dry_Total_g: nothing is learned" in done.stderr
    assert results["scores"]["model"]["per_target"]["Dry_Total_g"] == {"r2": None, "rmse_g": None}
    assert results["config"]["physics"] == "none"
    assert read_bundle(out).unlabelled == ["Dry_Dead_g", "Dry_Total_g"]
    said = command("predict", "--weights", out, "--photos", folder, "--out", tmp_path / "grams.csv",
                   "--no-cache", "--device-type", "cpu")
    assert said.returncode == 0, said.stderr
    grams = pd.read_csv(tmp_path / "grams.csv")
    assert grams[["Dry_Dead_kg_ha", "Dry_Total_g"]].isna().all(axis=None)
    assert grams[["Dry_Green_kg_ha", "GDM_g"]].notna().all(axis=None)
    refused = command("predict", "--weights", out, "--data", data, "--out", tmp_path / "submission.csv")
    assert refused.returncode == 2 and "a submission needs all five targets" in refused.stderr
    refused = command(
        "predict", "--weights", out, "--photos", folder, "--out", tmp_path / "x.csv", "--physics", "project")
    assert refused.returncode == 2 and "identities bind all five targets; drop it" in refused.stderr


def test_a_whole_table_gives_the_bits_of_train_csv(data, labels, weights, tmp_path):
    "One's own table and the competition's, of the same labels, teach the same member."
    own = tmp_path / "own"
    own.mkdir()
    (own / "train").symlink_to(data / "train")
    wide = labels.drop(columns=["photo", "path"])
    wide.to_csv(own / "labels.csv", index=False)
    more = ("--epochs", "1", "--train-folds", "0", "--quadrat-cm", "70", "30", "--unit", "g")
    tensors = []
    for folder in (data, own):
        out = tmp_path / f"run-{folder.name}"
        trained(folder, out, weights, tmp_path, *more)
        bundle = read_bundle(out)
        tensors.append(load_file(bundle.folder / bundle.members[0]["file"]))
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items(): np.testing.assert_array_equal(tensor, tensors[1][name])


def test_groups_and_random_folds(data, labels, weights, tmp_path):
    "A column of groups stays together in folds; without it and dates, folds are random, and that is told."
    folder = sheet(data, tmp_path / "own", labels, ("Foto", "Gruen", "Tot", "Klee", "Weide"))
    named = ("--columns", "green=Gruen", "dead=Tot", "clover=Klee")
    head = ("--head", "ridge")
    groups = ("--group-column", "Weide", "--n-folds", "2")
    done, results, oof = trained(folder, tmp_path / "grouped", weights, tmp_path, *named, *groups, *head)
    assert oof.groupby("Sampling_Group")["fold"].nunique().max() == 1 and results["units"] == "groups"
    assert "photos of held-out groups" in (tmp_path / "grouped/report.html").read_text(encoding="utf-8")
    done, results, oof = trained(folder, tmp_path / "random", weights, tmp_path, *named, *head)
    assert results["cv"] == results["config"]["cv"] == "random" and results["shared_dates"] is None
    assert "scores are optimistically biased" in done.stderr and "optimistically biased" in done.stdout
    assert "optimistically biased" in (tmp_path / "random/report.html").read_text(encoding="utf-8")


def test_a_fold_without_any_label_of_a_target_is_refused(data, labels, weights, tmp_path):
    clover = kg_per_ha(labels["Dry_Clover_g"].to_numpy(), (50, 50))
    clover[labels["Sampling_Date"] != labels["Sampling_Date"].iloc[0]] = np.nan
    folder = sheet(data, tmp_path / "own", labels, WIDE, Klee=clover)
    done = command("train", "--data", folder, "--out", tmp_path / "run",
                   *options(weights, tmp_path, "--columns", *NAMED, "--head", "ridge"))
    assert done.returncode == 2 and "all labels of Dry_Clover_g" in done.stderr


def test_other_commands_read_such_tables(data, labels, weights, finished, tmp_path):
    "biomass_train --dry-run and biomass_validate."
    folder = sheet(data, tmp_path / "own", labels, WIDE)
    done = command("train", "--data", folder, "--out", tmp_path / "run", "--dry-run",
                   *options(weights, tmp_path, "--columns", *NAMED, "--epochs", 1))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists() and "30 photos" in done.stdout
    done = command("validate", "--weights", finished, "--data", folder, "--unit", "kg_ha",
                   "--columns", *NAMED, "--device-type", "cpu")
    assert done.returncode == 0, done.stderr
    assert "group_date" in done.stdout and "leave_one_state_out" not in done.stdout


def test_a_recipe_and_a_weighed_join(data, labels, weights, tmp_path):
    "Runs of one table join, gaps and all; weights for each target come from the labels that are known."
    clover = kg_per_ha(labels["Dry_Clover_g"].to_numpy(), (50, 50))
    clover[::4] = np.nan
    folder = sheet(data, tmp_path / "own", labels, WIDE, Klee=clover)
    out = tmp_path / "run"
    more = ("--recipe", "linear", "--feature-blocks", "--pooling", "mean", "--grids", 1, 1, 2, 2)
    done = command(
        "train", "--data", folder, "--out", out, *options(weights, tmp_path, "--columns", *NAMED, *more))
    assert done.returncode == 0, done.stderr
    runs = [out / name for name in ("1x1-seed0", "2x2-seed0")]
    done = command("bundle", *runs, "--out", tmp_path / "joint", "--combine", "stacked", "--no-report-photos")
    assert done.returncode == 0, done.stderr
    for joint in (out / "bundle", tmp_path / "joint"):
        results = read_json(joint / "results.json")
        assert results["labels"]["Dry_Clover_g"] == len(labels) - len(labels[::4])
        assert all(np.isfinite(s["weighted_r2"]) for s in results["scores"].values())
