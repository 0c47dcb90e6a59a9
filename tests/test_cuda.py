"""What the CPU does, a GPU does too: `pytest -m cuda tests`.

Without a GPU, `pytest -m cuda --device cpu tests` tries the tests themselves.
"""
import dataclasses
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from ended_runs import killed_after
from untrained import random_weights, untrained_bundle

from biomass_kit.data.files import read_json
from biomass_kit.data.photos import list_photos
from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.targets import TARGETS
from biomass_kit.features import runner
from biomass_kit.features.backbone import Backbone, build_backbone
from biomass_kit.features.device import pick_device, pick_precision
from biomass_kit.features.store import FeatureRequest, feature_batches
from biomass_kit.features.tiles import TileSpec, cut_tiles
from biomass_kit.features.tta import STORED_VIEWS
from biomass_kit.inference.bundle import read_bundle
from biomass_kit.inference.ensemble import Ensemble
from biomass_kit.inference.predict import predict_competition, some_members
from biomass_kit.training import loop
from biomass_kit.training.config import TrainConfig
from biomass_kit.training.run import train

pytestmark = pytest.mark.cuda
RAW = [t + "_raw" for t in TARGETS]
# How far a prediction may lie from the CPU's in fp32, as a share of the spread of predictions over photos. On
# the CPU, with tiles rounded as a GPU rounds them, tiny transformers were off by at most 0.003 in fp32 and
# fp16 and 0.015 in bf16 of that spread; an H100 by 0.0007 g, 0.0008 g and 0.003 g.
SHARE = {"fp32": 0.03, "fp16": 0.03, "bf16": 0.1}


def assert_close(found, expected, precision="fp32"):
    "Of [n, 5] grams by two devices or in two precisions."
    spread = np.std(expected, axis=0).max()
    assert spread > 0.01 and np.abs(found - expected).max() < SHARE[precision] * spread


def assert_as_on_the_same_device(found, expected):
    "Of grams by one device, in batches of whatever size."
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "Twelve synthetic photos, eight test photos, random weights of a tiny transformer."
    work = tmp_path_factory.mktemp("cuda")
    write_dataset(work / "data", n_photos=12, n_test=8, seed=6, height=64)
    random_weights(work / "vit.safetensors")
    return work


@pytest.fixture
def base(work, tmp_path, device):
    "One fold in fp32, to be completed with one of RECIPES."
    return TrainConfig(
        data=work / "data", out=tmp_path / "run", n_folds=2, train_folds=(0,), backbone="test_vit",
        backbone_weights=work / "vit.safetensors", tile_size=32, batch_size=4, epochs=3, lr=0.01,
        cache_dir=tmp_path / "cache", device_type=device, precision="fp32")


def by_photo(table):
    "A submission as [photos, 5] grams."
    return table.target.to_numpy().reshape(-1, len(TARGETS))


def trained(config):
    "A run's raw out-of-fold grams, as its device gave them, beside the paths of their photos."
    train(config, log=lambda line: None)
    oof = pd.read_csv(config.out / "oof.csv")
    return oof[RAW].to_numpy(), [config.data / p for p in oof.image_path]


CLOSED = {  # without what only neural heads read
    "freeze_backbone": True,
    **{name: getattr(TrainConfig, name) for name in ("batch_size", "epochs", "lr")},
}
RECIPES = {
    "frozen": dict(freeze_backbone=True, use_aux_heads=True),
    "fine-tuned": dict(backbone_lr=1e-3),
    "checkpointed": dict(backbone_lr=1e-3, grad_checkpointing=True),
    "two stages, LoRA": dict(backbone_lr=1e-2, two_stage=True, freeze_epochs=1, lora_rank=2),
    "averaged": dict(backbone_lr=1e-3, average="ema"),
    "two blocks, two grids": dict(
        freeze_backbone=True, feature_blocks=(0.5, 1.0), pooling="mean+gem+std", also=("grid=1x1",)),
    "kernel ridge": CLOSED | dict(head="kernel_ridge"),
    "Gaussian process": CLOSED | dict(head="gaussian_process", also=("grid=1x1",)),
}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "auto"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_was_trained_here_predicts_the_same_on_the_cpu(base, device, recipe, precision):
    if precision == "fp16" and device == "cpu": pytest.skip("a CPU does not train in fp16")
    config = dataclasses.replace(base, precision=precision, **RECIPES[recipe])
    there, photos = trained(config)
    used = pick_precision(pick_device(device), precision)
    assert read_json(config.out / "results.json")["device"] == f"{device}, {used}"
    assert_close(there, Ensemble(read_bundle(config.out), device_type="cpu").predict(photos), used)


@pytest.mark.parametrize("recipe", ["frozen", "fine-tuned"])
def test_the_same_seed_twice_on_one_device(base, tmp_path, recipe):
    runs = [
        dataclasses.replace(base, out=tmp_path / name / "run", **RECIPES[recipe])
        for name in ("first", "again")]
    first, again = (trained(run)[0] for run in runs)
    assert_as_on_the_same_device(again, first)
    first, again = (read_json(run.out / "results.json")["scores"]["model"]["weighted_r2"] for run in runs)
    assert again == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("recipe", ["frozen", "fine-tuned"])
def test_a_run_that_was_killed_goes_on(base, tmp_path, monkeypatch, recipe):
    "From its second epoch, with the device's own random state."
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    config = dataclasses.replace(base, **RECIPES[recipe])
    killed_after(monkeypatch, config, 2)
    rest, epochs = [], loop.run_epoch
    monkeypatch.setattr(loop, "run_epoch", lambda f, at, stage: rest.append(at.epoch) or epochs(f, at, stage))
    found, _ = trained(config)
    # a step that has no ordered algorithm begins the member again
    begun = 1 if recipe == "frozen" else len(rest)
    assert rest == [2] * begun and begun in (1, 2), "the last epoch alone"
    assert_as_on_the_same_device(found, trained(dataclasses.replace(config, out=tmp_path / "whole/run"))[0])


@pytest.fixture
def learned(base):
    "A run trained on the CPU, frozen, for long enough to tell photos apart."
    config = dataclasses.replace(base, device_type="cpu", epochs=6, lr=0.03, **RECIPES["frozen"])
    trained(config)
    return config.out


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "auto"])
def test_predictions_in_each_precision(learned, work, tmp_path, device, precision):
    old = device == "cuda" and torch.cuda.get_device_capability() < (8, 0)
    if old and precision == "bf16": pytest.skip("this GPU emulates bf16")
    def table(name, *how):
        return predict_competition(
            learned, work / "data", tmp_path / name, device_type=how[0], precision=how[1])

    here, there = table("here.csv", "cpu", "fp32"), table("there.csv", device, precision)
    outcome = there.attrs["outcome"]
    used = pick_precision(pick_device(device), precision)
    assert not outcome.issues and outcome.devices[0].startswith(device)
    assert outcome.devices[0].endswith(f"in {used}")
    assert_close(by_photo(there), by_photo(here), used)


def test_passes_are_the_distinct_ones(work, tmp_path, device, monkeypatch):
    """5 folds x 2 grids x 4 views: 6 passes when frozen, 3 per member when fine-tuned, none for what is
    stored.

    All of them on the device.
    """
    seen, plain = Counter(), Backbone.forward

    def forward(self, tiles):
        seen[tiles.device.type] += tiles[..., 0, 0, 0].numel()
        return plain(self, tiles)

    monkeypatch.setattr(Backbone, "forward", forward)
    photos = list_photos(work / "data/test")
    bundles = [read_bundle(untrained_bundle(tmp_path / "frozen")),
               read_bundle(untrained_bundle(tmp_path / "tuned", ((2, 2),), fine_tuned=True))]
    frozen, tuned = (Ensemble(b, device_type=device, cache_dir=tmp_path / "cache") for b in bundles)
    for r in (*frozen.runners.values(), *tuned.runners.values()): r._most()  # a GPU measures with tiles
    seen.clear()
    first = frozen.predict(photos, batch_size=8)
    assert seen == {device: 8 * 2 * (4 + 9) * 3}
    seen.clear()
    assert_as_on_the_same_device(frozen.predict(photos, batch_size=3), first)
    assert not seen
    tuned.predict(photos, batch_size=8)
    assert seen == {device: 8 * 2 * 4 * 3 * 5}


def test_compiled_on_the_device(work, tmp_path, device, monkeypatch):
    "By the compiler that is there; the CPU's takes too long for a test."
    if device == "cpu": monkeypatch.setattr(runner, "BACKEND", "eager")
    bundle = read_bundle(untrained_bundle(tmp_path / "bundle"))
    photos, said = list_photos(work / "data/test"), []
    plain = Ensemble(bundle, device_type=device, compile="off").predict(photos, batch_size=3)
    compiled = Ensemble(bundle, device_type=device, compile="on", say=said.append)
    assert_close(compiled.predict(photos, batch_size=3), plain, compiled.precision)
    assert not said and all(r.block for r in compiled.runners.values())


def test_tiles_cut_on_the_device(device):
    "They differ from the CPU's by rounding alone."
    pair = torch.randint(
        0, 256, (2, 97, 97, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for spec in (TileSpec(1, 1, 32), TileSpec(2, 2, 64), TileSpec(3, 2, 28)):
        there, here = cut_tiles(pair.to(device), spec), cut_tiles(pair, spec)
        assert there.device.type == device and there.dtype == torch.uint8
        off = there.cpu().int() - here.int()
        assert off.abs().max() <= 1 and off.float().mean().abs() < 0.01


def test_features_made_on_the_device(work, device):
    "Tiles cut and seen there, in every view."
    photos, found = list_photos(work / "data/test"), {}
    for where in (device, "cpu"):
        backbone, size = build_backbone("test_vit", work / "vit.safetensors", 32)
        request = FeatureRequest(backbone.to(where).eval(), TileSpec(2, 2, size), tuple(STORED_VIEWS))
        batches = [features for (features,), _ in feature_batches(photos, [request], batch_size=8)]
        found[where] = torch.cat([batches[0][v] for v in STORED_VIEWS]).cpu()
        assert batches[0][STORED_VIEWS[0]].device.type == where
    assert (found[device] - found["cpu"]).norm() < 0.01 * found["cpu"].norm()


def test_too_little_memory_halves_the_batch(work, tmp_path, device, monkeypatch):
    "The error is played, all else is the device's: it remembers, and says so."
    folder, plain, tried = untrained_bundle(tmp_path / "bundle"), Backbone.forward, []
    options = dict(device_type=device, precision="fp32", batch_size=4)
    whole = predict_competition(folder, work / "data", tmp_path / "whole.csv", **options)

    def forward(self, tiles):
        tried.append(len(tiles))
        if len(tiles) > 2: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, tiles)

    monkeypatch.setattr(Backbone, "forward", forward)
    parts = predict_competition(folder, work / "data", tmp_path / "parts.csv", **options)
    said = "ran out of memory with 4 photos at once; 2 at once from here on"
    if device == "cuda": said = "ran out of memory with 312 tiles at once; 2 from here on"
    else: assert tried[:2] == [4, 2]
    assert max(tried[-9:]) == 2 and not parts.attrs["outcome"].issues
    assert any(said in line for line in parts.attrs["outcome"].notes)
    assert_close(by_photo(parts), by_photo(whole))


def test_memory_that_is_short_indeed(work, tmp_path, device):
    "A limit between what one photo takes and what eight take."
    if device == "cpu": pytest.skip("torch sets no limit on the CPU's memory")
    bundle = read_bundle(untrained_bundle(tmp_path / "bundle", ((2, 2),), 1, tile_size=512))
    photos, said = list_photos(work / "data/test"), []
    ensemble = Ensemble(bundle, device_type=device, precision="fp32", say=said.append)

    def taken(batch_size):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return ensemble.predict(photos, batch_size), torch.cuda.max_memory_reserved()

    whole, one = taken(1)
    _, eight = taken(8)
    assert eight > 2 * one and not said, "too small a model for this test"
    (tiles,) = ensemble.runners.values()
    most = tiles.most
    torch.cuda.empty_cache()
    there = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((one + eight) / 2 / there)
    try: parts, _ = taken(8)
    finally: torch.cuda.set_per_process_memory_fraction(1.0)
    assert (tiles.most < most or ensemble.fits in (1, 2, 4)) and "ran out of memory with" in said[0]
    assert_close(parts, whole)


def test_a_member_alone_and_among_others(work, tmp_path, device):
    "Backbones that share the device's memory stay apart."
    bundle = read_bundle(untrained_bundle(tmp_path / "tuned", ((2, 2),), 3, fine_tuned=True))
    photos = list_photos(work / "data/test")

    def predicted(of):
        return Ensemble(of, device_type=device, precision="fp32").predict(photos, batch_size=8)

    together = predicted(bundle)
    alone = [predicted(some_members(bundle, lambda m, k=k: m["fold"] == k)) for k in range(3)]
    assert_as_on_the_same_device(np.mean(alone, 0), together)
    assert np.abs(alone[0] - alone[2]).max() > 1e-3
