"""It learns what is drawn, answers alike when asked twice, and shares its work among processes."""
import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from commands import run_command, share
from conftest import assert_close, launch
from ended_runs import left, quiet
from safetensors.torch import load_file, save_file

from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.targets import BiomassError
from biomass_kit.evidence.space import as_options as options
from biomass_kit.inference.bundle import read_bundle
from biomass_kit.training.join import join_runs
from biomass_kit.training.loop import average_gradients
from biomass_kit.training.run import train


def test_heads_on_frozen_features_beat_the_floors(config, tmp_path):
    """Even a random convolutional network passes colours on;
    a head that learns reads drawn pasture far above the floors."""
    data = write_dataset(tmp_path / "data", n_photos=60, n_test=1, seed=5, height=96)
    results = train(
        dataclasses.replace(
            config, data=data, out=tmp_path / "run", use_aux_heads=False, epochs=60,
            cache_dir=tmp_path / "cache"), **quiet)
    score = {k: s["weighted_r2"] for k, s in results["scores"].items()}
    assert score["model"] > max(score["floor_constant"], score["floor_state"]) + 0.15, score


def test_shuffled_labels_teach_nothing(config, tmp_path):
    """With labels of other photos the out-of-fold score must not exceed the floor:
    nothing leaks into the scored fold."""
    shutil.copytree(config.data, tmp_path / "data")
    table = pd.read_csv(tmp_path / "data/train.csv")
    photos = table.image_path.unique()
    partner = dict(zip(photos, np.random.default_rng(0).permutation(photos)))
    grams = table.set_index(["image_path", "target_name"]).target
    table["target"] = [grams[partner[p], t] for p, t in zip(table.image_path, table.target_name)]
    table.to_csv(tmp_path / "data/train.csv", index=False)
    results = train(
        dataclasses.replace(
            config, data=tmp_path / "data", out=tmp_path / "run", epochs=30,
            cache_dir=tmp_path / "cache"), **quiet)
    scores = {name: score["weighted_r2"] for name, score in results["scores"].items()}
    assert scores["model"] < scores["floor_constant"] + 0.1


def test_seed_decides_everything(config, finished, tmp_path):
    train(dataclasses.replace(config, out=tmp_path / "again"), **quiet)
    assert left(tmp_path / "again")[:2] == left(finished)[:2], "its curves name the run"
    train(dataclasses.replace(config, out=tmp_path / "other", seed=1, train_folds=(0,)), **quiet)
    same, other = (
        load_file(next((folder / "bundle").glob("member-*fold0*")))
        for folder in (finished, tmp_path / "other"))
    assert not torch.equal(same["embed.weight"], other["embed.weight"]), "another seed, the same weights"


def first_member(config, out, **options):
    "Description and tensors of the member of fold 0 of a run."
    train(dataclasses.replace(config, out=out, train_folds=(0,), **options), **quiet)
    member, = read_bundle(out).members
    return member, load_file(out / "bundle" / member["file"])


def raw(out):
    "What the member of fold 0 says of its photos, in grams."
    table = pd.read_csv(out / "oof.csv")
    return table[table.fold == 0].filter(regex="_raw$").to_numpy()


LOUD = dict(use_aux_values=True, aux_ndvi_weight=3.0, aux_height_weight=3.0)  # heard within a few epochs


def test_values_teach_and_stay_behind(config, finished, tmp_path):
    "NDVI and height change what is learned and leave no tensor; without a weight they change nothing."
    plain = load_file(next((finished / "bundle").glob("member-*fold0*")))
    member, taught = first_member(config, tmp_path / "taught", **LOUD)
    shapes = {name: tensor.shape for name, tensor in taught.items()}
    assert shapes == {name: tensor.shape for name, tensor in plain.items()}
    assert member["model"] == read_bundle(finished).members[0]["model"]
    history = pd.read_csv(tmp_path / "taught/history.csv")
    assert (history[["ndvi", "height"]] > 0).all(axis=None) and np.isfinite(history.loss).all()
    silent = dict(use_aux_values=True, aux_ndvi_weight=0.0, aux_height_weight=0.0)
    first_member(config, tmp_path / "silent", **silent)
    assert_close(raw(tmp_path / "silent"), raw(finished))
    assert np.abs(raw(tmp_path / "taught") - raw(finished)).max() > 1e-2


def test_values_that_are_missing_are_left_out(config, finished, tmp_path):
    "Without the columns a run is what it was, asked for their heads or not; half of a column teaches."
    plain = load_file(next((finished / "bundle").glob("member-*fold0*")))
    shutil.copytree(config.data, tmp_path / "data")
    path = tmp_path / "data/train.csv"
    table = pd.read_csv(path)
    table.drop(columns=["Pre_GSHH_NDVI", "Height_Ave_cm"]).to_csv(path, index=False)
    without = dataclasses.replace(config, data=tmp_path / "data")
    same = first_member(without, tmp_path / "without")[1]
    assert all(torch.equal(same[name], tensor) for name, tensor in plain.items())
    with pytest.warns(UserWarning, match="no photo has a value of Pre_GSHH_NDVI or Height_Ave_cm") as said:
        first_member(without, tmp_path / "asked", use_aux_values=True)
    assert len(said) == 1
    assert_close(raw(tmp_path / "asked"), raw(finished))
    assert (pd.read_csv(tmp_path / "asked/history.csv")[["ndvi", "height"]] == 0).all(axis=None)
    half = table.image_path.isin(sorted(set(table.image_path))[::2])
    table.assign(Pre_GSHH_NDVI=table.Pre_GSHH_NDVI.where(half), Height_Ave_cm="NA").to_csv(path, index=False)
    with pytest.warns(UserWarning, match="no photo has a value of Height_Ave_cm,"):
        taught = first_member(without, tmp_path / "half", **LOUD)[1]
    assert all(tensor.isfinite().all() for tensor in taught.values())
    assert np.abs(raw(tmp_path / "half") - raw(finished)).max() > 1e-2
    history = pd.read_csv(tmp_path / "half/history.csv")
    assert (history.ndvi > 0).any() and (history.height == 0).all()


def test_two_processes_share_the_members(config, finished, tmp_path):
    "Members of two runs, dealt to two processes: each as one process alone would train it."
    two = dataclasses.replace(config, out=tmp_path / "runs", cache_dir=tmp_path / "cache")
    done = launch(2, "biomass_kit.train", *options(two), "--seeds", 0, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes share the members" in done.stdout + done.stderr
    assert "(1 finished already or another process's)" in done.stdout + done.stderr
    ours, theirs = (pd.read_csv(r / "oof.csv") for r in (tmp_path / "runs/2x2-seed0", finished))
    columns = [c for c in ours.columns if c.endswith(("_pred", "_raw"))]
    assert np.abs(ours[columns] - theirs[columns]).to_numpy().max() < 1e-3
    assert len(read_bundle(tmp_path / "runs/bundle").members) == 6


def averaging():
    "One of two processes, with a gradient and a number of photos of its own."
    a, p = Accelerator(cpu=True), torch.nn.Parameter(torch.zeros(2))
    assert a.num_processes == 2
    p.grad = torch.tensor([1.0, 2.0]) * (1 + 4 * a.process_index)
    average_gradients(a, SimpleNamespace(param_groups=[{"params": [p]}]), (3, 1)[a.process_index])
    assert torch.allclose(p.grad, torch.tensor([2.0, 4.0])), p.grad


def test_gradients_are_averaged_over_the_whole_batch(tmp_path):
    "Three photos here, one there: (3 g + 1 x 5 g) / 4 = 2 g."
    share(2, averaging, log=tmp_path / "said")


def test_two_processes_share_one_fine_tuned_member(config, tmp_path):
    "`--shard photos`: both processes take their part of each batch, and the network learns."
    live = dataclasses.replace(config, out=tmp_path / "run", freeze_backbone=False, cache_dir=None,
                               backbone_lr=1e-3, epochs=6, train_folds=(0,),
                               shard="photos", use_mixup=False, augment="none")
    said = share(2, run_command, "train", *options(live), log=tmp_path / "said")
    assert "2 processes share each batch" in said
    loss = pd.read_csv(tmp_path / "run/history.csv").loss
    assert loss.iloc[-1] < loss.iloc[0] and len(read_bundle(tmp_path / "run").members) == 1


def test_a_run_folder_belongs_to_one_run(config, finished, tmp_path):
    "Other starting weights, photos or options under a half-finished run are refused, not mixed in."
    shutil.copytree(config.data, tmp_path / "data")
    shutil.copy(config.backbone_weights, tmp_path / "weights.safetensors")
    mine = dataclasses.replace(
        config, data=tmp_path / "data", backbone_weights=tmp_path / "weights.safetensors",
        out=tmp_path / "run")
    train(dataclasses.replace(mine, train_folds=(0,)), **quiet)
    save_file(
        {k: v + 1 if v.is_floating_point() else v for k, v in load_file(config.backbone_weights).items()},
        tmp_path / "weights.safetensors")
    with pytest.raises(BiomassError, match="starting_weights"): train(mine, **quiet)
    shutil.copy(config.backbone_weights, tmp_path / "weights.safetensors")
    photo = next((tmp_path / "data/train").iterdir())
    photo.write_bytes(photo.read_bytes() + b"0")
    with pytest.raises(BiomassError, match="photos"): train(mine, **quiet)


def test_joining_again_replaces_what_changed(config, finished, tmp_path):
    "A second join into the same folder leaves no member of the first behind."
    other = dataclasses.replace(config, out=tmp_path / "other", epochs=1)
    train(other, **quiet)
    join_runs([finished, other.out], tmp_path / "joint")
    assert len(read_bundle(tmp_path / "joint").members) == 6
    join_runs([finished], tmp_path / "joint")
    assert len(read_bundle(tmp_path / "joint").members) == 3 == len(
        list((tmp_path / "joint").glob("member-*")))


class Scaler(torch.amp.GradScaler):
    "fp16's scaler on the CPU; the first of its steps may overflow."
    first = 1.0

    def scale(self, loss):
        scaled = super().scale(loss * self.first)
        self.first = 1.0
        return scaled


@pytest.mark.parametrize("first", (1.0, np.inf))
def test_a_scaler_changes_no_step_but_those_it_leaves_out(config, tmp_path, monkeypatch, first):
    """Every step scales the gradients down again, once, in both stages;
    one whose gradients are infinite is left out, and the next is scaled less."""
    scalers = []

    class Scaled(Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.scaler = Scaler("cpu", init_scale=2.0**10)
            self.scaler.first = first
            scalers.append(self.scaler)

    both = dataclasses.replace(
        config, freeze_backbone=False, two_stage=True, freeze_epochs=1, epochs=2, train_folds=(0,))
    train(dataclasses.replace(both, out=tmp_path / "plain"), **quiet)
    monkeypatch.setattr("biomass_kit.training.setup.Accelerator", Scaled)
    train(dataclasses.replace(both, out=tmp_path / "scaled"), **quiet)
    assert (left(tmp_path / "plain")[0] == left(tmp_path / "scaled")[0]) == (first == 1)
    assert scalers[-1].get_scale() == (2.0**10 if first == 1 else 2.0**9)
