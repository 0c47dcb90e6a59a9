"""Numbers that must not depend on how they were made: workers, kills, the cache;
and data too small or too flat to learn from."""
import dataclasses
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_close, python
from ended_runs import killed_after, left, quiet
from untrained import random_weights, untrained_bundle

from biomass_kit.data.folds import read_table
from biomass_kit.data.photos import list_photos
from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.targets import TARGETS, BiomassError
from biomass_kit.evidence.space import as_options as options
from biomass_kit.inference.predict import predict_photos
from biomass_kit.train import main as biomass_train
from biomass_kit.training import loop
from biomass_kit.training.config import TrainConfig
from biomass_kit.training.loop import CHECKPOINT
from biomass_kit.training.run import train

RAW = [t + "_raw" for t in TARGETS]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "Twelve synthetic photos and a tiny transformer that is read in the loop."
    work = tmp_path_factory.mktemp("numbers")
    data = write_dataset(work / "data", n_photos=12, n_test=2, seed=6, height=64)
    random_weights(work / "vit.safetensors")
    return TrainConfig(data=data, out=work / "run", n_folds=2, train_folds=(0,), backbone="test_vit",
                       backbone_weights=work / "vit.safetensors",
                       tile_size=32, batch_size=4, epochs=3, device_type="cpu")


def test_workers_and_kills_change_no_bit(base, tmp_path, monkeypatch):
    "Pixels augmented in the loop, with 0, 1 and 2 workers; begun with one number and gone on with another."
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)

    def run(name, workers):
        return dataclasses.replace(
            base, out=tmp_path / name / "run", num_workers=workers, backbone_lr=1e-3)

    for n in (0, 1, 2): train(run(f"{n}", n), **quiet)
    killed_after(monkeypatch, run("cut", 2), 2)
    train(run("cut", 1), **quiet)
    assert left(run("0", 0).out) == left(run("1", 1).out) == left(run("2", 2).out) == left(run("cut", 1).out)


def test_threads_change_no_bit(base, tmp_path):
    """Heads on stored features learn on one thread, whatever the machine has:
    sums of many threads end in other bits."""
    wide = dataclasses.replace(
        base, freeze_backbone=True, batch_size=12, hidden_ratio=4.0, cache_dir=tmp_path / "cache")
    before, runs = torch.get_num_threads(), {
        n: dataclasses.replace(wide, out=tmp_path / f"{n}/run") for n in (4, 1)}
    try:
        for n, config in runs.items():
            torch.set_num_threads(n)
            train(config, **quiet)
    finally: torch.set_num_threads(before)
    assert left(runs[1].out) == left(runs[4].out)


SHAPES = """
import sys, numpy as np, torch
from biomass_kit.data.photos import list_photos
from biomass_kit.inference.bundle import read_bundle
from biomass_kit.inference.ensemble import Ensemble
ensemble, photos, found = Ensemble(read_bundle(sys.argv[1]), device_type="cpu"), list_photos(sys.argv[2]), []
for threads, size in ((2, 4), (2, 1), (2, 3), (1, 4), (2, 4)):
    torch.set_num_threads(threads)
    found.append(ensemble.predict(photos, batch_size=size))
np.save(sys.argv[3], found)
"""


def test_batch_size_and_threads_change_last_bits_alone(base, tmp_path):
    """On a processor, played, where every other shape rounds in another way:
    within the promise, and alike when asked alike."""
    bundle, out = untrained_bundle(tmp_path / "bundle"), tmp_path / "found.npy"
    rounding = {"PYTHONPATH": f"{ROOT / 'tests/last_bits'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = python("-c", SHAPES, bundle, base.data / "train", out, env={**os.environ, **rounding})
    assert done.returncode == 0, done.stderr[-2000:]
    first, *others, again = np.load(out)
    assert np.array_equal(first, again)
    for other in others:
        assert not np.array_equal(other, first), "the rounding was not played"
        assert_close(other, first)


def oof(config):
    train(config, **quiet)
    return read_table(config.out / "oof.csv")[RAW].to_numpy()


def test_cached_as_not_cached(base, tmp_path):
    """With the same draws of flips and swaps, stored features in fp32 give what the backbone gives
    in every epoch; in fp16 it differs by what is said here."""
    plain = dataclasses.replace(
        base, freeze_backbone=True, augment="flips", use_mixup=False, use_cutmix=False, train_folds=None,
        epochs=6)
    anew = oof(dataclasses.replace(plain, cache=False, out=tmp_path / "anew/run"))
    off = {}
    for dtype in ("fp32", "fp16"):
        stored = dataclasses.replace(
            plain, cache_dtype=dtype, out=tmp_path / dtype / "run", cache_dir=tmp_path / dtype / "cache")
        off[dtype] = np.abs(oof(stored) - anew).max()
    print(
        f"largest difference to features computed in every epoch: fp32 store {off['fp32']:.2g} g, fp16 store "
        f"{off['fp16']:.2g} g")
    assert off["fp32"] < 1e-3 and 0 < off["fp16"] < 0.05
    photos = list_photos(base.data / "test")
    fresh, first, again = (
        predict_photos(tmp_path / "fp32/run", photos, device_type="cpu", cache_dir=c)
        for c in (None, tmp_path / "c", tmp_path / "c"))
    assert_close(first, fresh)
    assert_close(again, fresh)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_no_number_ends_the_run_and_names_the_photos(base, what, tmp_path, monkeypatch):
    """In the second epoch a batch gives no number:
    its photos are named, the epochs before are kept, and the run goes on from them when the fault is gone."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    config, plain, calls = dataclasses.replace(base, out=tmp_path / "run"), loop.total_loss, []

    def total_loss(outputs, truth, *rest):
        calls.append(len(truth["grams"]))
        loss, terms = plain(outputs, truth, *rest)
        if len(calls) != 4: return loss, terms
        # the root of zero has no slope
        return (loss * torch.nan if what == "loss" else loss + torch.sqrt(0 * outputs["grams"].sum())), terms

    batches, run = [], loop.train_step
    with monkeypatch.context() as patch:
        patch.setattr(loop, "total_loss", total_loss)
        patch.setattr(loop, "train_step", lambda f, batch, *rest: (
            batches.append([f.paths[i].rsplit("/", 1)[1] for i in batch["photo"]]), run(f, batch, *rest))[1])
        with pytest.raises(BiomassError) as e: train(config, **quiet)
    said, kept = str(e.value), config.out / f"folds/0{CHECKPOINT}"
    assert ("the loss is nan" if what == "loss" else "the gradient's norm is") in said
    assert f"photos {', '.join(batches[-1])};" in said and f"the epochs before are kept in {kept}" in said
    assert len(batches) == 4, said
    assert kept.is_file() and not (config.out / "results.json").exists()
    if what == "loss": return
    train(config, **quiet)
    train(dataclasses.replace(config, out=tmp_path / "whole/run"), **quiet)
    assert left(config.out) == left(tmp_path / "whole/run"), "it went on from the epochs that were kept"


def test_no_number_before_anything_is_kept(base, tmp_path, monkeypatch):
    "The message promises no checkpoint that is not there."
    monkeypatch.setattr(loop, "total_loss", lambda *_: (torch.tensor(torch.inf, requires_grad=True), {}))
    with pytest.raises(BiomassError, match="the loss is inf; photos .*; no epoch before was kept"):
        train(dataclasses.replace(base, out=tmp_path / "run"), **quiet)


def on_two_dates(table):
    codes = table.image_path.astype("category").cat.codes
    return table.assign(Sampling_Date=[f"2015/9/{4 + i % 2}" for i in codes])


SMALL = {  # name -> (table -> table, options)
    "one photo a fold": (
        lambda t: t[t.image_path.isin(sorted(set(t.image_path))[:4])], dict(cv="random", n_folds=4)),
    "two photos": (
        lambda t: t[t.image_path.isin(sorted(set(t.image_path))[:2])], dict(cv="random", n_folds=2)),
    "one state": (lambda t: t.assign(State="WA"), {}),
    "states without a name": (lambda t: t.assign(State="", Species=""), {}),
    "neither NDVI nor height": (lambda t: t.drop(columns=["Pre_GSHH_NDVI", "Height_Ave_cm"]), {}),
    "one height": (lambda t: t.assign(Pre_GSHH_NDVI="NA", Height_Ave_cm=5.0), {}),
    "one target constant": (
        lambda t: t.assign(target=t.target.where(t.target_name != "Dry_Dead_g", 0.0)), {}),
    "all targets constant": (lambda t: t.assign(target=5.0), {}),
    "nothing grows": (lambda t: t.assign(target=0.0), {}),
    "two dates": (on_two_dates, {}),
}


FLAT = ("all targets constant", "nothing grows")
BY_COMMAND = ("one photo a fold", "states without a name", "all targets constant")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SMALL)
def test_small_and_flat_data_work(base, name, tmp_path):
    """With every head that looks at labels, some by the command with two grids joined;
    what has no score says so, and every prediction is a number."""
    change, more = SMALL[name]
    shutil.copytree(base.data, tmp_path / "data")
    change(pd.read_csv(tmp_path / "data/train.csv", keep_default_na=False)).to_csv(
        tmp_path / "data/train.csv", index=False)
    config = dataclasses.replace(base, data=tmp_path / "data", out=tmp_path / "run", freeze_backbone=True,
                                 train_folds=None, batch_size=16,
                                 use_aux_heads=True, use_aux_values=True, interval_head=True, two_part=True,
                                 uncertainty=True,
                                 **more)
    out = config.out / "bundle" if name in BY_COMMAND else config.out
    if name in BY_COMMAND: biomass_train([*options(config), "--grids", "1", "1", "2", "2"])
    else: train(config, **quiet)
    results, table = json.loads((out / "results.json").read_text()), read_table(out / "oof.csv")
    score = results["scores"]["model"]["weighted_r2"]
    assert np.isfinite(table[RAW].to_numpy()).all() and len(table) == results["photos"]
    assert (score is None) == (name in FLAT), score
    assert np.isfinite(predict_photos(out, list_photos(tmp_path / "data/test"), device_type="cpu")).all()
    if name in BY_COMMAND: assert (out / "report.html").stat().st_size > 50_000
