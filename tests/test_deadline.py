"""A deadline ends training in time and says what is missing; the same command goes on to the same bits."""
import dataclasses
import json
import os
import shutil
import time

import pytest
from commands import Started, command, run_command, share
from ended_runs import left, quiet
from untrained import random_weights

from biomass_kit.data.files import write_json
from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.targets import BiomassError
from biomass_kit.evidence.space import as_options as options
from biomass_kit.inference.plan import Deadline
from biomass_kit.kaggle.sessions import bundle_digests, write_backbone
from biomass_kit.kaggle.training import train_attached
from biomass_kit.training import loop
from biomass_kit.training.deadline import MISSING, UNFINISHED, OutOfTime
from biomass_kit.training.run import train, train_runs

LIVE = dict(freeze_backbone=False, cache_dir=None, augment="flips", backbone_lr=1e-3, use_aux_heads=False)


@pytest.fixture(scope="module")
def base(config, tmp_path_factory):
    "Two folds of a tiny transformer, fine-tuned."
    work = tmp_path_factory.mktemp("deadline")
    weights = random_weights(work / "vit.safetensors")
    return dataclasses.replace(
        config, out=work / "whole/run", backbone="test_vit", backbone_weights=weights, tile_size=32,
        train_folds=(0, 1), **LIVE)


@pytest.fixture(scope="module")
def whole(base):
    train(base, **quiet)
    return base


class Clock:
    "A clock on which each epoch takes a minute; training moves it."

    def __init__(self): self.now = 0.0

    def __call__(self): return self.now

    def progress(self, turns, **options):
        for turn in turns:
            yield turn
            if options.get("unit") == "epoch": self.now += 60


def session(config, duration):
    "One session on a clock that is moved by hand; what it said, and what it ended with."
    clock, said = Clock(), []
    try:
        train_runs([config], clock.progress, said.append, deadline=Deadline(duration, clock))
    except OutOfTime as e: return said, str(e)
    return said, ""


@pytest.mark.parametrize("way", [{}, {"distill_aux": True}, {"two_stage": True, "freeze_epochs": 2}],
                         ids=["plain", "class teacher first", "two stages"])
def test_sessions_end_in_time_and_end_with_the_same_bits(base, way, tmp_path, monkeypatch):
    "Each session's folder is read-only to the next one, which copies it, as on Kaggle."
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    undisturbed = dataclasses.replace(base, out=tmp_path / "whole/run", **way)
    train(undisturbed, **quiet)
    sessions, out = 0, tmp_path / "0/run"
    while True:
        said, ended = session(dataclasses.replace(undisturbed, out=out), "190s")
        sessions += 1
        if not ended: break
        assert f"{out}: " in ended and "missing: " in ended and "same command" in ended
        noted = json.loads((out / MISSING).read_text())
        assert noted["deadline"] == "190s" and noted["missing"] and not (out / "results.json").exists()
        before, out = out, tmp_path / f"{sessions}/run"
        shutil.copytree(before, out)
        assert sessions < 12
    assert sessions > 2 and not (out / MISSING).exists() and left(out) == left(undisturbed.out)


def test_what_will_not_be_met_is_said_once_and_early(whole, tmp_path):
    said, ended = session(dataclasses.replace(whole, out=tmp_path / "run"), "5m")
    warned = [line for line in said if "will not be met" in line]
    assert len(warned) == 1 and ended
    assert said.index(warned[0]) < 3, "before the first member is done"
    said, ended = session(dataclasses.replace(whole, out=tmp_path / "again/run"), "2h")
    assert not ended and not [line for line in said if "will not be met" in line]
    assert left(tmp_path / "again/run") == left(whole.out)


def test_features_that_are_being_stored_are_kept(config, tmp_path):
    "The deadline comes while features are stored; the next session stores what is missing."
    frozen = dataclasses.replace(config, out=tmp_path / "run", cache_dir=tmp_path / "cache", train_folds=(0,))
    clock = Clock()

    def slowly(turns, **options):
        for turn in turns:
            yield turn
            clock.now += 60

    with pytest.raises(OutOfTime, match="0 of 1 member finished, missing: fold 0"):
        train_runs([frozen], slowly, **quiet, deadline=Deadline("10m", clock))
    kept = len(list((tmp_path / "cache").rglob("*.npy")))
    assert 0 < kept < 30 * 4
    train(frozen, **quiet)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 30 * 4


def test_by_command(whole, tmp_path):
    "Its exit code, its words, and the same command without the deadline."
    mine = dataclasses.replace(whole, out=tmp_path / "run")
    done = command("train", *options(mine), "--deadline", "0.01s")
    assert done.returncode == UNFINISHED == 75 and "0 of 2 members finished" in done.stdout, done.stderr
    assert "error" not in done.stderr and (mine.out / MISSING).is_file()
    done = command("train", *options(mine), "--deadline", "10m")
    assert done.returncode == 0 and "bundle: " in done.stdout, done.stderr
    assert left(mine.out) == left(whole.out) and not (mine.out / MISSING).exists()
    done = command("train", *options(mine), "--deadline", "soon")
    assert done.returncode == 2 and "--deadline soon: not a duration" in done.stderr


def in_time(config, duration):
    "`biomass_train` with a deadline, as one of several processes."
    loop.CHECKPOINT_SECONDS = 0
    run_command("train", *options(config), "--deadline", duration)


def launched_in_time(config, duration):
    "The same, where torchrun started it."
    os.environ["TORCHELASTIC_RUN_ID"] = "played"
    in_time(config, duration)


def test_processes_that_share_members_or_batches_end_together(whole, tmp_path):
    "Nobody waits for a process that stopped; members are shared anew by those that go on."
    for shard in ("members", "photos"):
        mine = dataclasses.replace(whole, out=tmp_path / shard / "run", shard=shard)
        said = share(2, launched_in_time, mine, "0.01s", log=tmp_path / f"{shard}.log")
        assert "0 of 2 members finished" in said and (mine.out / MISSING).is_file()
    mine = dataclasses.replace(whole, out=tmp_path / "members/run")
    share(2, launched_in_time, mine, "10m", log=tmp_path / "again.log")
    assert left(mine.out) == left(whole.out)


def test_ends_in_time_on_a_real_clock(base, tmp_path):
    "Many epochs, six seconds: over in time, with what was done."
    mine = dataclasses.replace(base, out=tmp_path / "run", epochs=5000)
    process = Started(in_time, mine, "6s", log=tmp_path / "log")
    process.wait_for((mine.out / ".lock.json").exists)
    began = time.monotonic()
    assert process.wait() == UNFINISHED, process.said()
    assert time.monotonic() - began < 12
    kept = json.loads((mine.out / MISSING).read_text())["missing"][0]["epochs"]
    assert kept > 0 and "will not be met" in process.said()


def test_a_damaged_checkpoint_is_named(base, tmp_path):
    "Where the line about what is missing would count its epochs."
    mine = dataclasses.replace(base, out=tmp_path / "run")
    (mine.out / "folds").mkdir(parents=True)
    (mine.out / f"folds/0{loop.CHECKPOINT}").write_bytes(b"half")
    with pytest.raises(BiomassError, match="not a checkpoint"): session(mine, "0.01s")


def test_the_training_notebook_shares_members_among_processes(tmp_path):
    "As it does among GPUs, by torchrun; the bundle is that of one process."
    data = write_dataset(tmp_path / "in/csiro", n_photos=14, n_test=2, height=64)
    write_backbone(data.parent / "backbone")
    tiny = {"tile_size": 32, "n_folds": 2, "epochs": 2, "device_type": "cpu"}
    write_json(data.parent / "backbone/training.json", tiny)
    said = []
    for processes in (1, 2):
        working = tmp_path / f"working{processes}"
        train_attached(data.parent, working, processes=processes, say=said.append)
    assert "2 processes share the members, each trained as a single process would" in said
    assert bundle_digests(tmp_path / "working1") == bundle_digests(tmp_path / "working2") != {}
