"""What a GPU does in another way, played here: large blocks, compiled kernels, weights in half precision."""
import os

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SHARED, assert_close, python
from untrained import random_weights, untrained_bundle

from biomass_kit.data.photos import list_photos
from biomass_kit.data.synthetic import write_dataset
from biomass_kit.features import runner
from biomass_kit.features.backbone import Backbone
from biomass_kit.inference.bundle import read_bundle
from biomass_kit.inference.ensemble import Ensemble
from biomass_kit.inference.predict import predict_folder
from biomass_kit.training.config import TrainConfig
from biomass_kit.training.run import train

# Root mean square of what half precision moves, as a share of the spread of predictions over photos. On real
# photos with a trained bundle (RESULTS.md) it was 0.0002 in fp16 and 0.0081 in bf16.
SHARE = {"fp16": 0.01, "bf16": 0.05}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "Seven synthetic photos, a bundle of 3 frozen folds of two grids, another of 2 fine-tuned folds."
    work = tmp_path_factory.mktemp("fast")
    write_dataset(work / "data", n_photos=12, n_test=7, seed=6, height=64)
    untrained_bundle(work / "frozen", folds=3)
    untrained_bundle(work / "tuned", ((2, 2),), 2, fine_tuned=True)
    return work


def predicted(work, name, precision="fp32", change=lambda e: None, **options):
    "Grams of the test photos, by an ensemble that was changed."
    ensemble = Ensemble(read_bundle(work / name), device_type="cpu", precision=precision, **options)
    change(ensemble)
    return ensemble.predict(list_photos(work / "data/test"), batch_size=3)


def as_on_a_gpu(ensemble):
    "Blocks of seven tiles of all views and grids, and a batch given before the last one is read."
    ensemble.overlaps = True
    for r in ensemble.runners.values():
        r.together = True
        r.most = 7


def share(found, due):
    return np.sqrt(np.square(found - due).mean() / due.var(0).mean())


@pytest.mark.parametrize("name", ["frozen", "tuned"])
def test_blocks_over_views_and_grids_change_last_bits_alone(work, name):
    assert_close(predicted(work, name, change=as_on_a_gpu), predicted(work, name))


def test_two_grids_share_forwards(work, monkeypatch):
    "13 tiles of a half, both halves, three views, three photos: 234 tiles in blocks of at most 60."
    seen, plain = [], Backbone.forward

    def forward(self, tiles):
        seen.append(tuple(tiles.shape))
        return plain(self, tiles)

    monkeypatch.setattr(Backbone, "forward", forward)

    def larger(ensemble):
        as_on_a_gpu(ensemble)
        for r in ensemble.runners.values(): r.most = 60

    predicted(work, "frozen", change=larger)
    assert seen[:4] == [(59, 3, 32, 32)] * 3 + [(57, 3, 32, 32)]
    assert sum(n for n, *_ in seen) == 7 * 2 * 13 * 3


@pytest.mark.parametrize("name", ["frozen", "tuned"])
def test_compiled_as_not_compiled(work, name, monkeypatch):
    "Blocks of one size, the last one of the last batch filled up."
    monkeypatch.setattr(runner, "BACKEND", "eager")
    sizes, plain = set(), runner._in_one_size

    def watched(run, tiles, size):
        sizes.add(size)
        return plain(run, tiles, size)

    monkeypatch.setattr(runner, "_in_one_size", watched)
    assert_close(predicted(work, name, compile="on"), predicted(work, name))
    assert sizes == {{"frozen": 234, "tuned": 72}[name]}


@pytest.mark.long
def test_really_compiled(work):
    "By the compiler of this machine, where it has one."
    said = []
    found = predicted(work, "frozen", compile="on", say=said.append)
    assert_close(found, predicted(work, "frozen"))
    if said: pytest.skip(f"no compiler: {said[0]}")


def test_a_compiler_that_fails_is_noted(work, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "BACKEND", "no such compiler")
    options = dict(device_type="cpu", cache_dir=None)
    plain = predict_folder(work / "frozen", work / "data/test", tmp_path / "a.csv", **options)
    table = predict_folder(work / "frozen", work / "data/test", tmp_path / "b.csv", compile="on", **options)
    assert any("test_vit runs uncompiled on cpu" in line for line in table.attrs["outcome"].notes)
    pd.testing.assert_frame_equal(table, plain, rtol=1e-5, atol=1e-4)


def test_a_batch_is_given_before_the_last_one_is_read(work):
    ensemble, events = Ensemble(read_bundle(work / "frozen"), device_type="cpu", precision="fp32"), []
    as_on_a_gpu(ensemble)
    plain = ensemble.predict_loaded

    def watched(photos, *rest):
        n, results = len(photos), plain(photos, *rest)
        events.append(f"given {n}")
        return lambda: events.append(f"read {n}") or results()

    ensemble.predict_loaded = watched
    ensemble.predict(list_photos(work / "data/test"), batch_size=3)
    assert events == ["given 3", "given 3", "read 3", "given 1", "read 3", "read 1"]


@pytest.mark.parametrize("precision", SHARE)
def test_weights_in_half_precision(work, precision):
    "The overflow of no photo, and a difference that is there and small."
    due = predicted(work, "frozen")
    assert 0 < share(predicted(work, "frozen", precision), due) < SHARE[precision]
    assert 0 < share(predicted(work, "frozen", precision, as_on_a_gpu), due) < SHARE[precision]


def test_a_head_learns_from_the_features_that_it_will_see(work, tmp_path, monkeypatch):
    "What training stored in bf16 is what prediction in bf16 would compute, so it is found."
    config = TrainConfig(
        data=work / "data", out=tmp_path / "run", n_folds=2, backbone="test_vit", precision="bf16",
        backbone_weights=random_weights(tmp_path / "vit.safetensors"), tile_size=32, freeze_backbone=True,
        epochs=2,
        cache_dir=tmp_path / "cache", device_type="cpu")
    train(config, log=lambda line: None)
    photos, bundle = list_photos(work / "data/train"), read_bundle(config.out)
    anew = Ensemble(bundle, device_type="cpu", precision="bf16").predict(photos, batch_size=1)
    calls, plain = [], Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, tiles: calls.append(1) or plain(self, tiles))
    options = dict(device_type="cpu", precision="bf16", cache_dir=config.cache_dir)
    assert_close(Ensemble(bundle, **options).predict(photos, batch_size=1), anew)
    assert not calls


def test_the_benchmark_for_a_gpu_runs_in_small(tmp_path):
    words = ["--device", "cpu", "--small", "--old", str(ROOT)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = python(ROOT / "tests/benchmarks/cuda.py", *words, env=env, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    for row in ("plan, compile on", "bare backbone, compiled", "of the fastest bare backbone", "older plan",
                "speed of the new plan"):
        assert row in done.stdout, done.stdout
    lines = [line for line in done.stdout.splitlines() if "largest difference" in line]
    gaps = [float(line.split("|")[2].split()[0]) for line in lines]
    assert len(gaps) == 2 and max(gaps) < 1e-3


@pytest.mark.long
@pytest.mark.skipif(not (SHARED / "csiro").is_dir(), reason="needs the real photos in ../shared")
def test_half_precision_on_real_photos(tmp_path, monkeypatch):
    "A head trained on real photos; products as a GPU rounds them."
    monkeypatch.syspath_prepend(ROOT / "tests/benchmarks")
    from precision import differences, in_half, some_photos

    config = TrainConfig(
        data=SHARED / "csiro", out=tmp_path / "run", n_folds=2, head="ridge", freeze_backbone=True,
        backbone="vit_small_patch14_dinov2", tile_size=112, cache_dir=tmp_path / "cache", device_type="cpu",
        backbone_weights=SHARED / "weights/vit_small_patch14_dinov2.safetensors")
    train(config, log=lambda line: None)
    bundle, paths = read_bundle(config.out), some_photos(SHARED / "csiro/train", 10)
    due = Ensemble(bundle, device_type="cpu").predict(paths)
    for name, bar in {"fp16": 0.002, "bf16": 0.02}.items():
        ensemble, rounded = in_half(bundle, "cpu", name, False)
        with rounded: found = ensemble.predict(paths, num_workers=0)
        assert 0 < differences(found, due)["share"] < bar, name
