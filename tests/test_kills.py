"""Nothing lost: a run that is killed, whenever, goes on from its last epoch and ends with the same bits;
and what stands in its way is named."""
import dataclasses
import itertools
import os
import random
import resource
import signal
import time

import pytest
import torch
from commands import Started, run_command
from ended_runs import killed_after, left, quiet
from untrained import random_weights

from biomass_kit.data.files import file_digest
from biomass_kit.data.targets import BiomassError
from biomass_kit.evidence.space import as_options as options
from biomass_kit.features import store
from biomass_kit.kaggle import packing
from biomass_kit.training import loop
from biomass_kit.training.loop import CHECKPOINT
from biomass_kit.training.run import train

LIVE = dict(freeze_backbone=False, cache_dir=None, augment="flips", backbone_lr=1e-3)
RECIPES = {
    "moving average": dict(average="ema"),
    "average of the last epochs": dict(average="swa"),
    "best epoch": dict(checkpoint="best"),
    "class teacher first": dict(distill_aux=True),
    "two stages": dict(two_stage=True, freeze_epochs=2, **LIVE),
    "two stages, LoRA": dict(two_stage=True, freeze_epochs=2, lora_rank=2, average="ema", **LIVE),
}


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    "One fold of a tiny transformer."
    work = tmp_path_factory.mktemp("kills")
    random_weights(work / "vit.safetensors")
    return dataclasses.replace(config, out=work / "run", backbone="test_vit",
                               backbone_weights=work / "vit.safetensors", tile_size=32,
                               use_aux_heads=False, train_folds=(0,))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_goes_on_from_its_last_epoch(one, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    whole = dataclasses.replace(one, out=tmp_path / "whole/run", **RECIPES[recipe])
    train(whole, **quiet)
    for epochs in (1, 2, 4):
        cut = dataclasses.replace(whole, out=tmp_path / f"cut{epochs}/run")
        killed_after(monkeypatch, cut, epochs)
        seen, step = [], loop.run_epoch
        with monkeypatch.context() as patch:
            patch.setattr(
                loop, "run_epoch", lambda f, loop, stage: seen.append(loop.epoch) or step(f, loop, stage))
            torch.manual_seed(99)  # whatever the new process drew before
            train(cut, **quiet)
        again = list(range(epochs, 4)) + (list(range(4)) if recipe == "class teacher first" else [])
        assert seen == again and left(cut.out) == left(whole.out)
        assert not list((cut.out / "folds").glob(f"*{CHECKPOINT}")), "finished folds need none"


def training(config):
    "`biomass_train`, which finds these short epochs worth keeping."
    loop.CHECKPOINT_SECONDS = 0
    run_command("train", *options(config))


def start(config, how=training):
    "A training process of its own."
    config.out.parent.mkdir(exist_ok=True)
    return Started(how, config, log=config.out.with_suffix(".log"))


def claimed(config, process): process.wait_for((config.out / ".lock.json").exists)


@pytest.fixture(scope="module")
def whole(one):
    "An undisturbed two-stage run of two folds, and how long it worked."
    config = dataclasses.replace(
        one, out=one.out.parent / "whole/run", train_folds=(0, 1), two_stage=True, freeze_epochs=2, epochs=6,
        **LIVE)
    process = start(config)
    claimed(config, process)
    began = time.time()
    assert process.wait() == 0, process.said()
    return config, time.time() - began


@pytest.mark.parametrize(
    "number", [*range(3), *(pytest.param(n, marks=pytest.mark.long) for n in range(3, 25))])
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(whole, number, tmp_path):
    config, seconds = whole
    cut = dataclasses.replace(config, out=tmp_path / "run")
    process = start(cut)
    claimed(cut, process)
    time.sleep(random.Random(number).uniform(0, seconds))
    process.kill()
    train(cut, **quiet)
    assert left(cut.out) == left(config.out)
    assert not list(cut.out.rglob(".tmp-*")), "half a file was left"


def test_held_then_interrupted_by_hand(whole, tmp_path):
    """A second run in the folder is refused with the first one's process;
    Ctrl-C is one word and leaves nothing half-written; the same command goes on."""
    config, _ = whole
    mine = dataclasses.replace(config, out=tmp_path / "run")
    first = start(mine)
    claimed(mine, first)
    first.send(signal.SIGSTOP)  # it shall not end meanwhile
    with pytest.raises(BiomassError, match=f"process {first.pid} on "): train(mine, **quiet)
    first.send(signal.SIGCONT)
    first.wait_for((mine.out / "folds" / f"0{CHECKPOINT}").exists)
    first.send(signal.SIGINT)
    assert first.wait() == 130, first.said()
    said = first.said()
    assert "interrupted" in said and "Traceback" not in said, said
    assert not list(mine.out.rglob(".tmp-*")) and not (mine.out / "results.json").exists()
    train(mine, **quiet)
    assert left(mine.out) == left(config.out)


def on_a_full_disk(config):
    "No file grows beyond 20 kB, as on a disk that is full."
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    training(config)


def test_a_full_disk(whole, tmp_path):
    """The file that could not be written is named, nothing is half-written,
    and with room the same command goes on."""
    config, _ = whole
    mine = dataclasses.replace(config, out=tmp_path / "run")
    process = start(mine, on_a_full_disk)
    assert process.wait() == 2
    said = process.said()
    assert f"{mine.out}" in said and "cannot be written" in said and "Traceback" not in said, said
    assert not list(mine.out.rglob(".tmp-*"))
    train(mine, **quiet)
    assert left(mine.out) == left(config.out)


def test_a_folder_that_takes_no_files(one, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BiomassError, match="file/run: cannot be made"):
        train(dataclasses.replace(one, out=tmp_path / "file/run"), **quiet)


def contents(folder):
    "Digest of every file, by its path."
    return {str(p.relative_to(folder)): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def entries(folder):
    # which another process renames
    found = [p for p in sorted(folder.rglob("*.npy")) if ".tmp-" not in p.name]
    return {str(p.relative_to(folder)): file_digest(p) for p in found}


def storing_slowly(config):
    plain = store.FeatureCache.put
    store.FeatureCache.put = lambda *entry: (plain(*entry), time.sleep(0.05))
    training(config)


def test_a_killed_feature_store_goes_on(one, tmp_path):
    """Killed after some photos: what is there is whole, the rest is added, nothing is computed again,
    and the features are those of an undisturbed store."""
    config = dataclasses.replace(
        one, out=tmp_path / "run", train_folds=(0,), epochs=1, cache_dir=tmp_path / "cache", num_workers=0)
    train(dataclasses.replace(config, cache_dir=tmp_path / "whole", out=tmp_path / "whole/run"), **quiet)
    process = start(config, storing_slowly)
    process.wait_for(lambda: len(entries(config.cache_dir)) >= 20)
    process.kill()
    half, whole = entries(config.cache_dir), entries(tmp_path / "whole")
    assert 20 <= len(half) < len(whole) == 30 * 4 and half.items() <= whole.items()
    inodes = {name: (config.cache_dir / name).stat().st_ino for name in half}
    train(config, **quiet)
    assert entries(config.cache_dir) == whole
    assert {name: (config.cache_dir / name).stat().st_ino for name in half} == inodes, (
        "what was there was not written again")
    assert left(config.out) == left(tmp_path / "whole/run")


def packing_until(killed_at, finished, out):
    "Ends for ever just before its n-th file appears under its name."
    plain, count = os.replace, itertools.count(1)

    def replace(*paths):
        if next(count) == killed_at:
            print("here")
            signal.pause()
        plain(*paths)

    os.replace = replace
    packing.pack(finished, out, say=lambda line: None)


@pytest.fixture(scope="module")
def packed(finished, tmp_path_factory):
    return packing.pack(finished, tmp_path_factory.mktemp("packed") / "whole")


@pytest.mark.parametrize("killed_at", [3, 8])
def test_a_killed_packing_is_packed_again_to_the_same_bytes(finished, packed, tmp_path, killed_at):
    """Killed just before its n-th file appears under its name:
    no file is half, and the next packing is as if nothing had been."""
    out = tmp_path / "packed"
    process = Started(packing_until, killed_at, finished, out, log=tmp_path / "said")
    process.wait_for(lambda: "here" in process.said())
    process.kill()
    half = {name: digest for name, digest in contents(out).items() if ".tmp-" not in name}
    assert len(half) == killed_at - 1 and len(half) < len(contents(out)), (
        "its n-th file was left under a temporary name")
    assert half.items() < contents(packed).items(), "what is there is whole"
    with pytest.raises(BiomassError): packing.check_packed(out)
    packing.pack(finished, out)
    assert contents(out) == contents(packed)
