"""The commands as a person types them: installed ones as processes, whatever else they do in this one."""
import json
import re
import resource
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import command
from conftest import python, run
from sources import commands

from biomass_kit.data.table import check_submission
from biomass_kit.data.targets import KG_HA, TARGETS
from biomass_kit.inference.bundle import read_bundle

HEAVY = ("torch", "timm", "albumentations", "sklearn")
BIN = Path(sys.executable).parent
PLAN = {  # the plan's recommended training commands, word for word but for the device
    "frozen": "--epochs 50 --freeze-backbone --use-aux-heads --aux-month-weight 5.0 --aux-state-weight 3.0 "
              "--aux-species-weight 2.0 "
              "--constraint-weight 0 --always-correct-dead --device-type cpu",
    "one fold 3x3": "--epochs 50 --freeze-backbone --grid 3 3 --use-aux-heads --aux-month-weight 5.0 "
                    "--aux-state-weight 3.0 --aux-species-weight 2.0 "
                    "--train-folds 0 --device-type cpu",
    "two stages": "--epochs 30 --two-stage --freeze-epochs 10 --lr 2e-4 --backbone-lr 1e-5 --use-aux-heads "
                  "--device-type cpu",
}


@pytest.mark.parametrize("name", PLAN)
def test_recommended_commands_run(name, data, weights, tmp_path, monkeypatch):
    tiny = ["--data", data, "--out", tmp_path / "run", "--backbone", "test_efficientnet",
            "--backbone-weights", weights, "--tile-size", 32, "--n-folds", 2]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = command("train", *shlex.split(PLAN[name]), *tiny)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run/results.json").read_text())
    bundle = read_bundle(tmp_path / "run")
    assert {"floor_constant", "floor_state", "model"} <= set(results["scores"])
    assert results["train_folds"] == ([0] if name == "one fold 3x3" else [0, 1])
    assert len(bundle.members) == len(results["train_folds"])
    history = pd.read_csv(tmp_path / "run/history.csv")
    assert set(history.epoch) == set(range(30 if name == "two stages" else 50))
    assert {"state", "month", "species"} <= set(history.columns)
    if name == "two stages":
        assert set(history.stage[history.epoch < 10]) == {0}
        assert set(history.stage[history.epoch >= 10]) == {1}
    if name == "frozen": assert bundle.manifest["physics"]["method"] == "always"
    backbones = {m["backbone"]["file"] for m in bundle.members}
    assert len(backbones) == (2 if name == "two stages" else 1), (
        "frozen members share a backbone, fine-tuned ones do not")


def test_an_absent_device_is_a_clear_error(data, tmp_path):
    absent = next(
        d for d,
        here in (("mps", torch.backends.mps.is_available()), ("cuda", torch.cuda.is_available())) if not here)
    words = ["--data", data, "--out", tmp_path / "run", "--epochs", "50", "--freeze-backbone"]
    done = command("train", *words, "--device-type", absent)
    assert done.returncode == 2
    assert f"--device-type {absent}: this machine has no {absent} device" in done.stderr
    assert "Traceback" not in done.stderr


def test_both_spellings_take_the_same_options():
    a, b = run(BIN / "biomass_train", "--help"), python("-m", "biomass_kit.train", "--help")
    assert a.returncode == b.returncode == 0 and a.stdout == b.stdout and "--backbone-weights" in a.stdout


def well(done):
    "What a command printed, which ended well."
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_draw_train_join_predict(tmp_path, monkeypatch):
    """From nothing to a submission with the installed commands;
    what one of them does again, it does in this process."""
    monkeypatch.chdir(tmp_path)

    def ok(name, *args): return well(run(BIN / name, *args, cwd=tmp_path))

    ok("biomass_synth", "--out", "data", "--photos", 16, "--test", 3, "--height", 64)
    options = ["--data", "data", "--backbone", "test_vit", "--no-pretrained", "--tile-size", 32]
    options += ["--epochs", 2, "--n-folds", 2, "--seed", 7, "--cv", "group_month", "--physics", "always",
                "--device-type", "cpu"]
    assert "floor_constant" in ok("biomass_train", *options, "--out", "run2", "--grid", 2, 2)
    assert "floor_constant" in well(command("train", *options, "--out", "run3", "--grid", 3, 3))
    ok("biomass_bundle", "run2", "run3", "--out", "both")
    ok("biomass_predict", "--data", "data", "--weights", "both", "--out", "submission.csv",
       "--device-type", "cpu")
    submission = check_submission(tmp_path / "submission.csv", tmp_path / "data")
    words = ["--weights", "both", "--out", "table.csv", "--physics", "always", "--device-type", "cpu"]
    well(command("predict", "--photos", "data/test", *words))
    table = pd.read_csv(tmp_path / "table.csv")
    table.index = table.photo.str.removesuffix(".jpg")
    for i, grams in zip(submission.sample_id, submission.target):
        assert abs(table.loc[i.split("__")[0], i.split("__")[1]] - grams) < 1e-3
    assert (tmp_path / "both/report.html").stat().st_size > 50_000
    assert np.isfinite(table[list(TARGETS)]).all(axis=None)
    assert np.allclose(table[list(KG_HA)], table[list(TARGETS)] * 1000 / 21, atol=0.01)
    assert (tmp_path / "table_report.html").stat().st_size > 30_000
    before = (tmp_path / "both/report.html").read_text()
    assert "both/report.html" in well(command("report", "both"))
    assert (tmp_path / "both/report.html").read_text() == before


def test_mistakes_are_one_line(finished, data, tmp_path):
    (tmp_path / "notes.txt").write_text("no photo")
    for args, words in (
        (["--weights", finished, "--photos", tmp_path], "holds no photo"),
        (["--weights", tmp_path, "--data", data], "no manifest.json"),
        (["--weights", finished, "--data", tmp_path], "test.csv: no such file"),
        (["--weights", finished], "give either --data"),
    ):
        done = command("predict", *args)
        said = done.stderr.splitlines()
        assert done.returncode == 2 and len(said) == 1, said
        assert said[0].startswith("error: ") and words in said[0], (
            done.stderr)


def test_questions_to_ask_before_believing_a_score(finished, data, tmp_path, monkeypatch):
    "Every strategy beside its floors; and the same photos against themselves look alike."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["--weights", finished, "--data", data, "--device-type", "cpu"]
    strategies = ["--n-folds", 3, "--strategies", "group_date", "random"]
    done = command("validate", *words, *strategies, "--out", tmp_path / "cv.csv")
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(tmp_path / "cv.csv").set_index("cv")
    assert list(table.index) == ["group_date", "random"]
    assert {"probe", "floor_constant", "floor_state"} <= set(table)
    assert table.loc["group_date", "difference"] == 0
    done = command("compare", *words, "--first", data / "train", "--second", data / "train")
    assert done.returncode == 0, done.stderr[-2000:]
    auc = float(re.search(r"AUC (\d\.\d+) between 30 and 30", done.stdout)[1])
    assert auc < 0.7 and "two groups of dates" in done.stdout, done.stdout


ASKED = """
import importlib, sys
module, _, name = sys.argv[1].partition(":")
command = getattr(importlib.import_module(module), name)
for word in ("--help", "--mistyped"):
    sys.argv[1:] = [word]
    try: command()
    except SystemExit as e: print("left with", e.code)
print("loaded", *(name for name in {heavy!r} if name in sys.modules))
"""


@pytest.mark.parametrize("name, entry", commands().items(), ids=commands())
def test_help_and_a_mistyped_option_load_nothing_heavy(name, entry):
    done = python("-c", ASKED.format(heavy=HEAVY), entry)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    ends = [line for line in said if line.startswith("left with")]
    assert ends == ["left with 0", "left with 2"], done.stdout
    assert said[-1] == "loaded", f"{name} loads them before it knows what is asked"
    assert f"usage: {name} " in done.stdout and f"{name} --help" in done.stderr


def cpu_seconds(*arguments):
    "What a Python takes, of the user and of the system; and its exit code."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = python(*arguments).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, code


def test_help_and_a_mistyped_option_cost_less_than_torch():
    "The best of three each, in turn, so that a machine that is busy for a while is so for all."
    asked = {"import torch": ("-c", "import torch")} | {
        f"biomass_{name} {word}": ("-m", f"biomass_kit.{name}", word)
        for name in ("train", "predict") for word in ("--help", "--mistyped")
    }
    rounds = [{what: cpu_seconds(*words) for what, words in asked.items()} for _ in range(3)]
    assert {what: code for what, (_, code) in rounds[0].items()} == {
        what: 2 if what.endswith("--mistyped") else 0 for what in asked}
    best = {what: min(one[what][0] for one in rounds) for what in asked}
    limit = best.pop("import torch")
    assert max(best.values()) < limit, f"{best} s of CPU time, and import torch takes {limit:.2f} s"
