"""However it ends: Ctrl-C, errors, a device that hangs, a home that takes no files:
what is the exit code, what is left?"""
import ast
import dataclasses
import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pkgutil import resolve_name

import numpy as np
import pandas as pd
import pytest
import torch
from commands import Started, command, run_command
from conftest import python
from sources import MODULES, commands
from untrained import untrained_bundle

from biomass_kit.command import command as wrapped
from biomass_kit.data import photos as reading
from biomass_kit.data.files import file_digest
from biomass_kit.data.interrupts import at_work, begin
from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.table import check_submission
from biomass_kit.data.targets import TARGETS, BiomassError
from biomass_kit.features.backbone import Backbone
from biomass_kit.inference.bundle import Bundle
from biomass_kit.inference.ensemble import Ensemble
from biomass_kit.inference.issues import MEANS, summary_lines
from biomass_kit.inference.predict import predict_competition, predict_folder, predict_photos
from biomass_kit.kaggle import predict_inputs
from biomass_kit.training.folder import held_by_me
from biomass_kit.training.run import train

CPU = torch.device("cpu")
SIMPLE = ("--device-type", "cpu", "--batch-size", "1")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "Six synthetic test photos and a bundle of 5 frozen folds of two grids: six passes for a batch."
    work = tmp_path_factory.mktemp("ends")
    write_dataset(work / "data", n_photos=4, n_test=6, seed=5, height=64)
    untrained_bundle(work / "frozen")
    return work


@pytest.fixture(scope="module")
def whole(work):
    "The submission, undisturbed, a photo at a time."
    return by_photo(predicted(work, work / "whole.csv", device_type="cpu"))


def predicted(work, out, **options):
    "The submission, a photo at a time."
    return predict_competition(work / "frozen", work / "data", out, batch_size=1, **options)


def by_photo(table): return table.target.to_numpy().reshape(-1, len(TARGETS))


def is_means(table): return np.isclose(by_photo(table), 20).all(1)


# Exit codes

def codes_while_at_work(entries):
    "Prints the exit code of every command, and of every end of one, each in a fork of its own."
    at_work.__defaults__ = (0.05,)  # seconds of patience
    fine = wrapped(lambda args: sys.modules[__name__].parse())
    faults = {
        "none": None, "mistake": BiomassError, "no memory": MemoryError, "bug": KeyError,
        "ctrl-c": KeyboardInterrupt}
    codes = {name: code_while_at_work(fine, fault) for name, fault in faults.items()}
    codes |= {name: code_while_at_work(resolve_name(name), KeyboardInterrupt) for name in entries}
    print(f"codes: {codes}")


def code_while_at_work(entry, fault):
    "The exit code of a command that ends, well or by a fault, while a thread goes on for ever."
    if child := os.fork(): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    begun = threading.Event()

    def busy():
        begun.set()
        while True: torch.ones(300, 300) @ torch.ones(300, 300)

    def parse(*_):
        begin(busy, "device")
        begun.wait()
        if fault: raise fault("first line")

    sys.modules[entry.__module__].parse = parse
    entry()
    sys.exit()


def test_every_command_keeps_its_exit_code_while_a_device_is_at_work(tmp_path):
    "Python's own way out would abort the process: 'terminate called', exit code -6."
    entries = [*commands().values()]
    process = Started(codes_while_at_work, entries, log=tmp_path / "said")
    assert process.wait() == 0, process.said()
    said = process.said()
    assert len(entries) == 13 and "terminate" not in said, said
    found = ast.literal_eval(said.rpartition("codes: ")[2])
    ends = {"none": 0, "mistake": 2, "no memory": 2, "bug": 1, "ctrl-c": 130}
    assert found == ends | dict.fromkeys(entries, 130)
    assert said.count("Traceback") == 1 and "error: first line" in said, "only what nobody expected has one"


def predicting_until(passes, hangs, *words):
    "`biomass_predict`, the device of which hangs after so many backbone passes."
    calls, plain = itertools.count(), Backbone.forward

    def forward(self, tiles):
        if next(calls) < passes: return plain(self, tiles)
        hangs.touch()
        while True: torch.ones(1500, 1500) @ torch.ones(1500, 1500)

    Backbone.forward = forward
    run_command("predict", *words)


def interrupted(work, tmp_path, passes, *options):
    "Ctrl-C after so many backbone passes of `biomass_predict`; (exit code, what it said)."
    words = ["--weights", work / "frozen", "--out", tmp_path / "s.csv", *SIMPLE, "--no-cache", *options]
    process = Started(predicting_until, passes, tmp_path / "hangs", *words, log=tmp_path / "said")
    process.wait_for((tmp_path / "hangs").exists)
    time.sleep(0.5)  # what was predicted before is handed over
    process.send(signal.SIGINT)
    return process.wait(60), process.said()


def test_ctrl_c_during_prediction_saves_what_is_known(work, whole, tmp_path):
    (tmp_path / "s.csv").write_text("of yesterday")
    code, said = interrupted(work, tmp_path, 2 * 6, "--data", work / "data")
    assert code == 130 and "terminate" not in said and "Traceback" not in said, said
    assert "s.csv holds predictions of 2 of 6 photos" in said and said.strip().endswith("interrupted")
    table = check_submission(tmp_path / "s.csv", work / "data")
    assert np.allclose(by_photo(table)[:2], whole[:2], atol=1e-3)
    assert is_means(table).tolist() == [False] * 2 + [True] * 4
    assert pd.read_csv(tmp_path / "s_issues.csv").reason.tolist() == ["not predicted yet"] * 4


def test_ctrl_c_before_the_first_prediction_leaves_what_was_there(work, tmp_path):
    (tmp_path / "s.csv").write_text("of yesterday")
    code, said = interrupted(work, tmp_path, 0, "--photos", work / "data/test")
    assert code == 130 and said.strip().endswith("interrupted") and "Traceback" not in said, said
    assert (tmp_path / "s.csv").read_text() == "of yesterday" and not list(tmp_path.glob("s_*"))


# What is left behind

def interrupts(after):
    "A `progress` that ends after so many batches, as Ctrl-C does."
    def progress(batches, **_):
        for i, batch in enumerate(batches):
            if i == after: break
            yield batch
        raise KeyboardInterrupt
    return progress


@pytest.mark.parametrize("predict, source", [(predict_competition, "data"), (predict_folder, "data/test")])
@pytest.mark.parametrize("before", [None, "of yesterday"])
def test_no_table_of_means_is_left_by_an_error(work, tmp_path, monkeypatch, predict, source, before):
    out, issues = tmp_path / "s.csv", tmp_path / "s_issues.csv"
    for path in (out, issues) if before else (): path.write_text(before)
    with pytest.raises(KeyboardInterrupt):
        predict(work / "frozen", work / source, out, device_type="cpu", progress=interrupts(0))
    seen = []

    def fails(self, *args):
        seen.append(len(out.read_text()))
        raise MemoryError

    monkeypatch.setattr(Ensemble, "__init__", fails)
    with pytest.raises(MemoryError): predict(work / "frozen", work / source, out, device_type="cpu")
    assert seen and min(seen) > 100, "while it worked, there was a table of means"
    for path in (out, issues): assert (path.read_text() if path.exists() else None) == before


def test_on_kaggle_the_means_stay_whatever_fails(work, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        predict_inputs(work / "frozen", work / "data", tmp_path, device_type="cpu", progress=interrupts(0))
    assert is_means(check_submission(tmp_path / "submission.csv", work / "data")).all()
    monkeypatch.setattr(Ensemble, "__init__", lambda *_: {}["gone"])
    table = predict_inputs(work / "frozen", work / "data", tmp_path)
    said = summary_lines(table)
    assert is_means(table).all() and "6 got training means" in said[1] and "all devices failed" in said[1]
    assert "cpu failed (KeyError: 'gone'); no other device is left" in said


def test_interrupted_later_what_is_known_is_saved(work, whole, tmp_path):
    out = tmp_path / "s.csv"
    out.write_text("of yesterday")
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="holds predictions of 3 of 6 "
                                                                           "photos"):
        predicted(work, out, device_type="cpu", progress=interrupts(3))
    table = check_submission(out, work / "data")
    assert np.allclose(by_photo(table)[:3], whole[:3], atol=1e-3)
    assert is_means(table).tolist() == [False] * 3 + [True] * 3


def test_a_list_of_issues_that_cannot_be_written_costs_no_submission(work, tmp_path):
    (tmp_path / "s_issues.csv").mkdir()
    table = predict_competition(work / "frozen", work / "data", tmp_path / "s.csv", device_type="cpu")
    assert not is_means(check_submission(tmp_path / "s.csv", work / "data")).any()
    assert any("s_issues.csv" in line for line in summary_lines(table))


# Devices

FAULTS = {
    MemoryError: (), OSError: (errno.EIO, "Input/output error"), KeyError: ("x",),
    RuntimeError: ("CUDA error\nmore",)}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_a_device_raises_its_photos_go_to_the_other(work, whole, tmp_path, monkeypatch, fault):
    first, plain, lock = [], Ensemble.predict_loaded, threading.Lock()

    def fails(self, *args):
        with lock: first.append(self)
        if first[0] is self: raise fault(*FAULTS[fault])
        return plain(self, *args)

    monkeypatch.setattr(Ensemble, "predict_loaded", fails)
    table = predicted(work, tmp_path / "s.csv", devices=[CPU, CPU])
    assert np.allclose(by_photo(table), whole, atol=1e-3) and not table.attrs["outcome"].issues
    (line,) = table.attrs["outcome"].notes
    assert line.startswith("cpu failed (") and line.endswith("went to cpu")


def test_all_devices_fail_after_some_photos(work, whole, tmp_path, monkeypatch):
    done, plain = [], Ensemble.predict_loaded

    def fails(self, *args):
        if len(done) == 2: raise OSError(errno.EIO, "Input/output error")
        done.append(1)
        return plain(self, *args)

    monkeypatch.setattr(Ensemble, "predict_loaded", fails)
    table = predicted(work, tmp_path / "s.csv", device_type="cpu")
    assert np.allclose(by_photo(table)[:2], whole[:2], atol=1e-3)
    assert is_means(table).tolist() == [False] * 2 + [True] * 4
    assert set(pd.read_csv(tmp_path / "s_issues.csv").reason) == {"all devices failed"}
    done.clear()
    photos = list((work / "data/test").iterdir())
    with pytest.raises(OSError, match="Input/output"):
        predict_photos(work / "frozen", photos, device_type="cpu", batch_size=1)


def test_a_damaged_bundle_is_the_end_whatever_was_predicted(work, tmp_path, monkeypatch):
    def damaged(self, *asked): raise BiomassError("weights do not fit")
    monkeypatch.setattr(Bundle, "load_backbone", damaged)
    with pytest.raises(BiomassError, match="do not fit"):
        predict_inputs(work / "frozen", work / "data", tmp_path)


def test_a_device_that_hangs_while_its_models_are_built_holds_nobody_up(work, whole, tmp_path, monkeypatch):
    "No deadline: the other device predicts all photos, and that is the end."
    never, lock, built, plain = threading.Event(), threading.Lock(), [], Backbone.to

    def to(self, *args, **options):
        with lock: built.append(threading.get_ident())
        if built[0] == threading.get_ident(): never.wait(120)
        return plain(self, *args, **options)

    monkeypatch.setattr(Backbone, "to", to)
    began = time.monotonic()
    table = predicted(work, tmp_path / "s.csv", devices=[CPU, CPU])
    assert time.monotonic() - began < 100 and at_work(0)
    assert np.allclose(by_photo(table), whole, atol=1e-3)
    never.set()
    assert not at_work(60), threading.enumerate()


@pytest.mark.parametrize("gone", ["before anything gave a value", "where some members gave one"])
def test_a_photo_that_is_gone_when_it_is_read_again(work, tmp_path, monkeypatch, gone):
    some, reads = gone.startswith("where"), []
    plain_forward, plain_read = Backbone.forward, reading.read_photo
    stuck = sorted((work / "data/test").iterdir())[2].name

    def forward(self, tiles):
        out = plain_forward(self, tiles)
        finer = tiles.shape[2] == 9  # tiles
        if self.dtype != torch.float32 and not (some and finer): out[:] = torch.nan
        return out

    def read(path):
        reads.append(str(path))
        again = sum(p.endswith(stuck) for p in reads) > 1
        if str(path).endswith(stuck) and again: raise BiomassError(f"{path}: no such photo")
        return plain_read(path)

    monkeypatch.setattr(Backbone, "forward", forward)
    monkeypatch.setattr(reading, "read_photo", read)
    table = predicted(work, tmp_path / "s.csv", device_type="cpu", precision="bf16")
    issues = pd.read_csv(tmp_path / "s_issues.csv").set_index("photo")
    mine = issues.loc[next(n for n in issues.index if n.endswith(stuck))]
    assert "could not be read again (no such photo)" in mine.reason
    assert mine.fallback == ("the other 5 members" if some else MEANS) and is_means(table).sum() == (not some)
    assert issues.fallback.drop(mine.name).tolist() == ["the whole in fp32"] * 5


# A home that takes no files

def test_a_cache_that_nobody_asked_for(work, whole, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no home can lie below a file")
    monkeypatch.setenv("HOME", str(tmp_path / "file/home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    words = ["--weights", work / "frozen", "--data", work / "data", "--out", tmp_path / "s.csv", *SIMPLE]
    done = command("predict", *words)
    assert done.returncode == 0 and done.stderr.count("features are not kept") == 1, done.stderr
    assert done.stdout.count("features are not kept") == 1, "among the closing lines"
    assert np.allclose(by_photo(check_submission(tmp_path / "s.csv", work / "data")), whole, atol=1e-3)
    asked = command("predict", *words, "--cache-dir", tmp_path / "file/cache")
    assert asked.returncode == 2 and "give another --cache-dir" in asked.stderr
    assert "Traceback" not in asked.stderr
    table = check_submission(tmp_path / "s.csv", work / "data")
    assert np.allclose(by_photo(table), whole, atol=1e-3), "the table that was there"


def test_training_goes_on_without_a_cache(config, finished, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    mine = dataclasses.replace(config, out=tmp_path / "run", cache_dir=None)
    with pytest.warns(UserWarning, match="features are not kept"): train(mine, log=lambda line: None)
    assert left(mine.out) == left(finished)


def left(run):
    "Digests of what a run leaves."
    files = [*(run / "bundle").glob("*.safetensors"), run / "oof.csv"]
    return {p.name: file_digest(p) for p in files}


# What belongs to others

def test_a_run_removes_only_what_its_own_killed_processes_left(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = [tmp_path / f"{place}.tmp-{gone.pid}-0a1b2c3d-oof.csv" for place in ("", "folds/", "bundle/")]
    names = (
        f"nested/folds/.tmp-{gone.pid}-0a1b2c3d-oof.csv", "folds/.tmp-1-0a1b2c3d-oof.csv", "folds/.tmp-notes")
    others = [tmp_path / name for name in names]
    folder = tmp_path / f"folds/.tmp-{gone.pid}-0a1b2c3d-folder"
    for path in (*mine, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    folder.mkdir()
    with held_by_me(tmp_path): pass
    assert not any(p.exists() for p in mine) and all(p.exists() for p in others) and folder.is_dir()


IMPORTS = """
import importlib, sys, warnings, numpy, pandas, PIL.Image, PIL.ImageOps, tqdm.std
before = warnings.filters[:], warnings.showwarning
import biomass_kit.data.photos, biomass_kit.data.table
assert (warnings.filters, warnings.showwarning) == before, warnings.filters
for name in sys.argv[1:]: importlib.import_module(f"biomass_kit.{name}")
import optuna
assert warnings.showwarning is before[1] and optuna.logging.get_verbosity() == optuna.logging.INFO
assert not [f for f in warnings.filters if f[2] is PIL.Image.DecompressionBombWarning]
"""


def test_importing_the_library_changes_no_warnings():
    done = python("-c", IMPORTS, *MODULES)
    assert done.returncode == 0, done.stderr


def test_a_command_leaves_warnings_as_they_were(work, tmp_path, capsys):
    from biomass_kit.predict import main

    with warnings.catch_warnings():
        before = warnings.filters[:], warnings.showwarning
        words = [
            "--weights", work / "frozen", "--data", work / "data", "--out", tmp_path / "s.csv", "--no-cache",
            *SIMPLE]
        main(list(map(str, words)))
        assert (warnings.filters, warnings.showwarning) == before
    assert "6 photos" in capsys.readouterr().out
