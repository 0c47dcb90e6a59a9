"""Backbone passes are counted, not timed: what noise cannot shake.
And what is shared among processes stays whole."""
import dataclasses
import resource

import pandas as pd
import pytest
from commands import Started, run_command, share
from conftest import assert_close
from safetensors.torch import save
from untrained import untrained_bundle

from biomass_kit import features
from biomass_kit.data.files import file_digest
from biomass_kit.data.photos import list_photos
from biomass_kit.data.targets import TARGETS
from biomass_kit.features.backbone import Backbone, build_backbone
from biomass_kit.features.store import FeatureCache, FeatureRequest, store_features
from biomass_kit.features.tiles import TileSpec
from biomass_kit.features.tta import STORED_VIEWS
from biomass_kit.inference.bundle import read_bundle
from biomass_kit.inference.ensemble import Ensemble
from biomass_kit.inference.predict import predict_folder
from biomass_kit.training.run import train, train_runs


@pytest.fixture
def passes(monkeypatch):
    "How often any backbone was called."
    calls, plain = [], Backbone.forward
    monkeypatch.setattr(
        Backbone, "forward", lambda self, tiles: calls.append(len(tiles)) or plain(self, tiles))
    return calls


def test_passes_are_the_distinct_ones(data, tmp_path, passes):
    """5 folds x 2 grids x 4 views:
    6 passes when frozen, 3 a member when fine-tuned, none for photos seen before."""
    photos = list_photos(data / "test")
    frozen = Ensemble(
        read_bundle(untrained_bundle(tmp_path / "frozen")), device_type="cpu", cache_dir=tmp_path / "cache")
    first = frozen.predict(photos, batch_size=len(photos))
    assert passes == [len(photos)] * 6
    passes.clear()
    assert_close(frozen.predict(photos, batch_size=3), first)
    assert passes == []
    tuned = Ensemble(
        read_bundle(untrained_bundle(tmp_path / "tuned", ((2, 2),), fine_tuned=True)), device_type="cpu")
    tuned.predict(photos, batch_size=len(photos))
    assert passes == [len(photos)] * 3 * 5
    passes.clear()
    unseen = Ensemble(frozen.bundle, device_type="cpu", precision="bf16", cache_dir=tmp_path / "cache")
    unseen.predict(photos, batch_size=len(photos))
    assert len(passes) == 6, "other arithmetic, other features"


def test_one_batch_asks_only_for_what_is_missing(data, tmp_path, passes):
    photos = list_photos(data / "test")
    ensemble = Ensemble(
        read_bundle(untrained_bundle(tmp_path / "b")), device_type="cpu", cache_dir=tmp_path / "cache")
    ensemble.predict(photos[1:3])
    passes.clear()
    ensemble.predict(photos, batch_size=4)
    assert passes == [len(photos) - 2] * 6


def test_training_sees_each_variant_once(config, tmp_path, passes):
    "Folds, epochs and seeds read what the first run stored."
    first = dataclasses.replace(config, out=tmp_path / "a", cache_dir=tmp_path / "cache")
    train(first, log=lambda line: None)
    assert sum(passes) == 30 * 4
    passes.clear()
    train(dataclasses.replace(first, out=tmp_path / "b", seed=1), log=lambda line: None)
    assert passes == []
    train(dataclasses.replace(first, out=tmp_path / "taught", teacher=first.out), log=lambda line: None)
    assert passes == [], "the teacher reads the same features"
    for seed in (0, 1):
        train(
            dataclasses.replace(first, out=tmp_path / f"drawn{seed}", stored_draws=2, seed=seed),
            log=lambda line: None)
    assert sum(passes) == 30 * 2, "seeds share the stored draws"


def test_frozen_weights_are_read_twice_and_written_once(config, tmp_path, monkeypatch):
    "For what they are kept under and for their file's name, by all members of all runs."
    seen = []

    def counted(tensors, *rest):
        if "conv_stem.weight" in tensors: seen.append(len(tensors))
        return save(tensors, *rest)

    monkeypatch.setattr(features.backbone, "save", counted)
    runs = [dataclasses.replace(config, out=tmp_path / str(seed), seed=seed) for seed in range(2)]
    train_runs(runs, log=lambda line: None)
    assert len(seen) == 2 + len(runs)
    for run in runs:
        file, = (run.out / "bundle").glob("backbone-*")
        assert file.stem == f"backbone-{file_digest(file)[:16]}"


def stored(data, weights, cache):
    "Features of all photos in all variants, out of the store or into it."
    backbone, size = build_backbone("test_efficientnet", weights, 64)
    spec = TileSpec(2, 2, size)
    kept = FeatureCache(backbone.eval(), spec, cache)
    return store_features(list_photos(data / "train"), FeatureRequest(backbone, spec, STORED_VIEWS, kept))


def storing(data, weights, cache):
    "Prints the sum of what it stored, of what it read, and of what it read again."
    for _ in range(3): found = stored(data, weights, cache)
    print(sum(float(found.gather(range(30), v).double().sum()) for v in STORED_VIEWS))


def test_two_processes_write_the_same_store_at_once(data, weights, tmp_path):
    both = [Started(storing, data, weights, tmp_path / "cache", log=tmp_path / f"said{i}") for i in range(2)]
    assert [p.wait() for p in both] == [0, 0], [p.said() for p in both]
    sums = [float(p.said()) for p in both]
    files = list((tmp_path / "cache").rglob("*.*"))
    assert sums[0] == pytest.approx(sums[1], rel=1e-9)
    assert len(files) == 30 * 4 and not [f for f in files if f.suffix != ".npy"]


def test_two_processes_share_the_photos(data, tmp_path):
    "Each predicts half, the main one writes all; an unreadable photo is named once."
    folder, photos = untrained_bundle(tmp_path / "b"), tmp_path / "photos"
    photos.mkdir()
    for p in list_photos(data / "train")[:7]: (photos / p.name).write_bytes(p.read_bytes())
    bad = sorted(photos.iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.warns(UserWarning, match="1 of 7"):
        alone = predict_folder(folder, photos, tmp_path / "alone.csv", device_type="cpu")
    words = [
        "--weights", folder, "--photos", photos, "--out", tmp_path / "shared.csv", "--device-type", "cpu",
        "--no-cache"]
    said = share(2, run_command, "predict", *words, log=tmp_path / "said")
    shared = pd.read_csv(tmp_path / "shared.csv")
    assert shared.photo.tolist() == alone.photo.tolist()
    assert_close(shared[list(TARGETS)], alone[list(TARGETS)])
    assert pd.read_csv(tmp_path / "shared_issues.csv").photo.tolist() == [bad.name]
    assert said.count("shared.csv: 7 rows") == 1


def storing_with_few_files(data, weights, cache):
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    print(stored(data, weights, cache).array.shape)


def test_a_store_needs_few_open_files(data, weights, tmp_path):
    """Thirty photos in four variants under a limit of 64 open files:
    hundreds of photos must fit under the usual 1024."""
    process = Started(storing_with_few_files, data, weights, tmp_path / "cache", log=tmp_path / "said")
    assert process.wait() == 0 and process.said().startswith("(30, 4, 2, 4,"), process.said()
