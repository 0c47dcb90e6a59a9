"""Backbone passes are counted, not timed: what noise cannot shake. And what is shared among processes stays whole."""
import dataclasses
import subprocess
import sys

import pandas as pd
import pytest
from conftest import assert_close, launch, python
from untrained import untrained_bundle

from biomass_kit.inference.bundle import read_bundle
from biomass_kit.data.photos import list_photos
from biomass_kit.inference.ensemble import Ensemble
from biomass_kit.inference.predict import predict_folder
from biomass_kit.features.backbone import Backbone
from biomass_kit.data.targets import TARGETS
from biomass_kit.training.run import train


@pytest.fixture
def passes(monkeypatch):
    "How often any backbone was called."
    calls, plain = [], Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, tiles: calls.append(len(tiles)) or plain(self, tiles))
    return calls


def test_passes_are_the_distinct_ones(data, tmp_path, passes):
    "5 folds x 2 grids x 4 views: 6 passes when frozen, 3 a member when fine-tuned, none for photos seen before."
    photos = list_photos(data / "test")
    frozen = Ensemble(read_bundle(untrained_bundle(tmp_path / "frozen")), device_type="cpu", cache_dir=tmp_path / "cache")
    first = frozen.predict(photos, batch_size=len(photos))
    assert passes == [len(photos)] * 6
    passes.clear()
    assert_close(frozen.predict(photos, batch_size=3), first)
    assert passes == []
    tuned = Ensemble(read_bundle(untrained_bundle(tmp_path / "tuned", ((2, 2),), fine_tuned=True)), device_type="cpu")
    tuned.predict(photos, batch_size=len(photos))
    assert passes == [len(photos)] * 3 * 5
    passes.clear()
    unseen = Ensemble(frozen.bundle, device_type="cpu", precision="bf16", cache_dir=tmp_path / "cache")
    unseen.predict(photos, batch_size=len(photos))
    assert len(passes) == 6, "other arithmetic, other features"


def test_one_batch_asks_only_for_what_is_missing(data, tmp_path, passes):
    photos = list_photos(data / "test")
    ensemble = Ensemble(read_bundle(untrained_bundle(tmp_path / "b")), device_type="cpu", cache_dir=tmp_path / "cache")
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
    for seed in (0, 1): train(dataclasses.replace(first, out=tmp_path / f"drawn{seed}", stored_draws=2, seed=seed), log=lambda line: None)
    assert sum(passes) == 30 * 2, "seeds share the stored draws"


WRITER = """
import sys; from biomass_kit.features.backbone import build_backbone; from biomass_kit.features.tiles import TileSpec; from biomass_kit.features.store import FeatureCache, FeatureRequest, store_features
from biomass_kit.data.photos import list_photos; from biomass_kit.features.tta import STORED_VIEWS
b, size = build_backbone("test_efficientnet", sys.argv[1], 64); b.eval()
r = FeatureRequest(b, TileSpec(2, 2, 64), STORED_VIEWS, FeatureCache(b, TileSpec(2, 2, 64), sys.argv[3]))
for _ in range(3): stored = store_features(list_photos(sys.argv[2]), r)
print(sum(float(stored.gather(range(30), v).double().sum()) for v in STORED_VIEWS))
"""


def test_two_processes_write_the_same_store_at_once(data, weights, tmp_path):
    command = [sys.executable, "-c", WRITER, str(weights), str(data / "train"), str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = [float(p.communicate()[0]) for p in both]
    files = list((tmp_path / "cache").rglob("*.*"))
    assert [p.returncode for p in both] == [0, 0] and sums[0] == pytest.approx(sums[1], rel=1e-9)
    assert len(files) == 30 * 4 and not [f for f in files if f.suffix != ".npy"]


def test_two_processes_share_the_photos(data, tmp_path):
    "Each predicts half, the main one writes all; an unreadable photo is named once."
    folder, photos = untrained_bundle(tmp_path / "b"), tmp_path / "photos"
    photos.mkdir()
    for p in list_photos(data / "train")[:7]: (photos / p.name).write_bytes(p.read_bytes())
    bad = sorted(photos.iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.warns(UserWarning, match="1 of 7"): alone = predict_folder(folder, photos, tmp_path / "alone.csv", device_type="cpu")
    done = launch(2, "biomass_kit.ensemble", "--weights", folder, "--photos", photos, "--out", tmp_path / "shared.csv", "--device-type", "cpu", "--no-cache")
    assert done.returncode == 0, done.stderr[-3000:]
    shared = pd.read_csv(tmp_path / "shared.csv")
    assert shared.photo.tolist() == alone.photo.tolist()
    assert_close(shared[list(TARGETS)], alone[list(TARGETS)])
    assert pd.read_csv(tmp_path / "shared_issues.csv").photo.tolist() == [bad.name] and done.stdout.count("shared.csv: 7 rows") == 1


MANY = """
import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from biomass_kit.features.backbone import build_backbone
from biomass_kit.features.tiles import TileSpec; from biomass_kit.features.store import FeatureCache, FeatureRequest, store_features
from biomass_kit.data.photos import list_photos; from biomass_kit.features.tta import STORED_VIEWS
b, size = build_backbone("test_efficientnet", sys.argv[1], 64); b.eval()
stored = store_features(list_photos(sys.argv[2]), FeatureRequest(b, TileSpec(2, 2, 64), STORED_VIEWS, FeatureCache(b, TileSpec(2, 2, 64), sys.argv[3])))
print(stored.array.shape)
"""


def test_a_store_needs_few_open_files(data, weights, tmp_path):
    "Thirty photos in four variants under a limit of 64 open files: hundreds of photos must fit under the usual 1024."
    done = python("-c", MANY, weights, data / "train", tmp_path / "cache")
    assert done.returncode == 0 and done.stdout.startswith("(30, 4, 2, 4,"), done.stderr[-2000:]
