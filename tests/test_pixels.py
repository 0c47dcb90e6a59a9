"""Training on pixels: photos decoded once, copies named by numbers, a first stage on stored features."""
import contextlib
import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from commands import Started
from conftest import assert_close
from ended_runs import killed_after, left, quiet
from torch.overrides import TorchFunctionMode
from untrained import random_weights

from biomass_kit.data.photos import list_photos, read_pair
from biomass_kit.data.targets import TARGETS
from biomass_kit.features import pairs
from biomass_kit.features.augment import Box
from biomass_kit.features.backbone import Backbone
from biomass_kit.features.pairs import PairStore, decode_pair
from biomass_kit.features.tiles import TileSpec
from biomass_kit.training import batches, loop
from biomass_kit.training.batches import PixelBatches, stage_batches
from biomass_kit.training.config import check_config
from biomass_kit.training.run import train

SPEC = TileSpec(2, 2, 32)


@pytest.fixture(scope="module")
def photos(data): return list_photos(data / "train")[:10]


@pytest.fixture(scope="module")
def finetuned(config, tmp_path_factory):
    "One fold of a tiny transformer that is fine-tuned with every pixel transform."
    work = tmp_path_factory.mktemp("pixels")
    weights = random_weights(work / "vit.safetensors")
    return dataclasses.replace(
        config, out=work / "run", cache_dir=work / "cache", backbone="test_vit", backbone_weights=weights,
        tile_size=32, use_aux_heads=False, train_folds=(0,), freeze_backbone=False, backbone_lr=1e-3,
        batch_size=4)


def batches_of(config, photos, workers, read, epochs=(0, 1, 2), for_gpu=False):
    "All that the batches of some epochs hold, in order."
    config = dataclasses.replace(check_config(config), num_workers=workers)
    dataset = PixelBatches(photos, SPEC, config, fold=1, read=read, for_gpu=for_gpu)
    batches = list(stage_batches(dataset, np.arange(len(photos)), epochs))
    assert [sorted(sum((b["photo"].tolist() for b in batches[i : i + 3]), [])) for i in (0, 3, 6)] == [
        list(range(10))] * 3
    return batches


def same(some, others):
    "Whether batches hold the same bits."
    keys = ("photo", "tiles", "partner")
    return len(some) == len(others) and all(
        a["box"] == b["box"] and torch.equal(torch.as_tensor(a["share"]), torch.as_tensor(b["share"]))
        and all(torch.equal(a[key], b[key]) for key in keys) for a, b in zip(some, others))


@pytest.mark.parametrize("size", ("native", "tiles"))
def test_draws_are_the_same_bits_with_any_workers_and_any_store(finetuned, photos, size, tmp_path):
    config = dataclasses.replace(
        finetuned, augment_size=size, augment_crop=True, augment_green=True, mixup_prob=0.5)
    kept = SPEC if size == "tiles" else None
    plain = batches_of(config, photos, 0, lambda path: decode_pair(path, kept))
    assert {b["box"] != Box() for b in plain} == {True, False}, "some batches with a box and some without"
    for workers, where in itertools.product((0, 1, 4), ("one", "one", "two")):
        kept_there = PairStore(tmp_path / where, kept)
        assert same(batches_of(config, photos, workers, kept_there), plain), (workers, where)
    other = batches_of(dataclasses.replace(config, seed=1), photos, 0, PairStore(tmp_path / "one", kept))
    assert not same(other, plain)


def test_tiles_for_a_gpu_are_the_same_bits_in_pinned_memory(finetuned, photos, monkeypatch):
    plain, taken = batches_of(finetuned, photos, 1, read_pair), []
    assert same(batches_of(finetuned, photos, 1, read_pair, for_gpu=True), plain), "where none can be had too"
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: taken.append(t.clone()) or taken[-1])
    found = batches_of(finetuned, photos, 1, read_pair, for_gpu=True)
    assert same(found, plain)
    assert [b["tiles"].data_ptr() for b in found] == [t.data_ptr() for t in taken]


class Looks(TorchFunctionMode):
    "Counts how often Python asks for a tensor's value, for which a GPU would be waited for."
    asking = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.asking
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", ({}, dict(use_aux_heads=True), dict(parts=2)))
def test_a_step_asks_its_device_for_one_value(finetuned, tmp_path, monkeypatch, options):
    counts, step, options = [], loop.train_step, dict(options)
    parts = options.pop("parts", 1)

    def counted(f, batch, optimizer, stage):
        f.parts = parts
        with Looks() as looks: found = step(f, batch, optimizer, stage)
        counts.append(looks.count)
        return found

    monkeypatch.setattr(loop, "train_step", counted)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)  # whose own numbers lie on the CPU
    config = dataclasses.replace(finetuned, out=tmp_path / "run", epochs=1, **options)
    train(config, **quiet)
    assert counts and set(counts) == {1}


def test_one_epoch_does_not_depend_on_those_before(finetuned, photos):
    whole = batches_of(finetuned, photos, 4, read_pair)
    dataset = PixelBatches(photos, SPEC, check_config(finetuned), fold=1)
    alone = list(stage_batches(dataset, np.arange(len(photos)), [2]))
    assert same(alone, whole[6:])


def test_a_photo_is_decoded_once_for_all_epochs_and_folds(finetuned, tmp_path, monkeypatch):
    counts, plain = {}, pairs.read_pair

    def read(path):
        counts[path] = counts.get(path, 0) + 1
        return plain(path)

    monkeypatch.setattr(pairs, "read_pair", read)
    said = []
    config = dataclasses.replace(
        finetuned, out=tmp_path / "run", cache_dir=tmp_path / "cache", train_folds=None)
    train(config, log=said.append)
    assert len(counts) == 30 and set(counts.values()) == {1}
    assert any("cache" in line and "GB of at most" in line for line in said)
    train(dataclasses.replace(config, out=tmp_path / "again"), **quiet)
    assert set(counts.values()) == {1}, "nor by a later run"


def test_a_run_ends_with_the_same_bits_with_and_without_the_store(finetuned, tmp_path):
    found = []
    for name, options in {"kept": {}, "full": dict(cache_gb=1e-5), "crowd": dict(num_workers=4)}.items():
        config = dataclasses.replace(
            finetuned, out=tmp_path / name / "run", cache_dir=tmp_path / f"cache-{name}", **options)
        if name == "full":
            with pytest.warns(UserWarning, match="not every photo is kept decoded"): train(config, **quiet)
        else: train(config, **quiet)
        found.append(left(config.out))
    assert found[0] == found[1] == found[2]
    without = dataclasses.replace(finetuned, out=tmp_path / "without", cache=False, cache_dir=None)
    train(without, **quiet)
    assert left(without.out)[1] == found[0][1], "its members' names hold the option; its predictions do not"


@pytest.mark.parametrize("size", ("native", "tiles"))
def test_a_killed_run_goes_on_to_the_same_bits(finetuned, size, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    whole = dataclasses.replace(
        finetuned, out=tmp_path / "whole/run", two_stage=True, freeze_epochs=2, augment_size=size,
        num_workers=3)
    train(whole, **quiet)
    for epochs in (1, 3):
        cut = dataclasses.replace(whole, out=tmp_path / f"cut{epochs}/run")
        killed_after(monkeypatch, cut, epochs)
        train(cut, **quiet)
        assert left(cut.out) == left(whole.out)


def fill(folder, photos):
    "Read photos through a store, twice, in another process."
    kept = PairStore(folder)
    for photo in (*photos, *photos): assert np.array_equal(kept(photo), read_pair(photo))


def test_processes_share_a_store(photos, tmp_path):
    jobs = [Started(fill, tmp_path / "cache", photos, log=tmp_path / f"{i}.log") for i in range(2)]
    for job in jobs: assert job.wait() == 0, job.said()
    assert len(list((tmp_path / "cache").rglob("*-pair.npy"))) == len(photos)
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


FIRST = dict(two_stage=True, freeze_epochs=3, epochs=4, use_mixup=False, use_cutmix=False)


def passes(config, monkeypatch):
    "The stage of every backbone pass over training batches, by epoch; and the run's predictions."
    seen, step, forward = [], loop.run_epoch, Backbone.forward
    now = []

    def epoch(f, at, stage):
        now[:] = [at.epoch]
        found = step(f, at, stage)
        now.clear()
        return found

    def counted(self, tiles):
        seen.append(now[0] if now else None)
        return forward(self, tiles)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_epoch", epoch)
        patch.setattr(Backbone, "forward", counted)
        train(config, **quiet)
    oof = np.genfromtxt(config.out / "oof.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    return seen, np.stack([oof[f"{t}_raw"] for t in TARGETS], 1)


@pytest.mark.parametrize("options", (
    dict(augment="flips"), dict(augment="none"), dict(augment="flips", lora_rank=2),
    dict(augment="flips", checkpoint="best", average="none")))
def test_a_first_stage_without_pixel_changes_reads_stored_features(finetuned, options, tmp_path, monkeypatch):
    base = dataclasses.replace(finetuned, cache_dir=tmp_path / "cache", **FIRST, **options)
    seen, grams = passes(dataclasses.replace(base, out=tmp_path / "stored"), monkeypatch)
    assert not {0, 1, 2} & set(seen) and 3 in seen, "the backbone ran in the first stage"
    assert None in seen, "its features were stored before"
    live = dataclasses.replace(base, out=tmp_path / "live", cache=False, cache_dir=None)
    seen, due = passes(live, monkeypatch)
    assert {0, 1, 2, 3} <= set(seen)
    assert_close(grams, due)


@pytest.mark.parametrize("options", (dict(use_mixup=True), dict(use_cutmix=True), dict(augment="full")))
def test_a_first_stage_that_changes_photos_looks_at_them(finetuned, options, tmp_path, monkeypatch):
    changed = {**FIRST, "augment": "flips", **options}
    config = dataclasses.replace(finetuned, out=tmp_path / "run", cache_dir=tmp_path / "cache", **changed)
    seen, _ = passes(config, monkeypatch)
    assert {0, 1, 2, 3} <= set(seen)


def test_later_members_also_read_the_starting_backbones_features(finetuned, tmp_path):
    flips = dataclasses.replace(finetuned, augment="flips", **FIRST)
    config = dataclasses.replace(
        flips, out=tmp_path / "both", cache_dir=tmp_path / "cache", train_folds=(0, 1))
    train(config, **quiet)
    alone = dataclasses.replace(
        flips, out=tmp_path / "second", cache_dir=tmp_path / "other", train_folds=(1,))
    train(alone, **quiet)
    (name,) = (name for name in left(alone.out)[0] if name.startswith("member"))
    assert left(config.out)[0][name] == left(alone.out)[0][name]


def test_threads_that_come_later_get_as_many_cores_as_before(finetuned, photos, monkeypatch):
    "Those that cut tiles take one each, and what they leave behind them is not for others."
    @contextlib.contextmanager
    def left_at_one():
        torch.set_num_threads(1)
        yield

    cores = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(batches, "one_thread", left_at_one)
        batches_of(finetuned, photos, 2, read_pair)
        with ThreadPoolExecutor(1) as later: assert later.submit(torch.get_num_threads).result() == 2
    finally: torch.set_num_threads(cores)
