"""A search that several processes share, that is killed, and that goes on: every trial once, none lost."""
import collections
import json
import os
import re
import shlex
import time

import pandas as pd
import pytest
import tyro
from commands import Started, run_command
from sources import CODE, MODULES, inside, outside_imports, own_imports, syntax, when_loaded
from untrained import random_weights

from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.targets import TARGETS, weighted_r2
from biomass_kit.evidence.space import SPACE, as_options
from biomass_kit.train import TrainArgs
from biomass_kit.training import run as running
from biomass_kit.training.config import TrainConfig

TRIALS = 3
SEARCHED = [k for k in SPACE if k not in ("grid", "use_aux_heads") and not k.startswith("aux_")]

def searching(out, processes, hangs_at, *words):
    """`biomass_search`; each member that it trains is a line in the diary.

    Waits until all processes have begun, and for ever at the fold in which it is to be killed.
    """
    plain = running.train_member

    def write(run, k, what):
        with open(diary_of(out), "a") as diary:
            diary.write(f"{run.config.out.relative_to(out)} {k} {what} {os.getpid()}\n")

    def waits():
        lines = [line.split() for line in diary_of(out).read_text().splitlines()]
        if len({pid for *_, pid in lines}) < processes: return True
        return sum(what == "begins" for _, _, what, _ in lines) == hangs_at

    def train_member(run, k, progress, log):
        write(run, k, "begins")
        while waits(): time.sleep(0.05)
        plain(run, k, progress, log)
        write(run, k, "done")

    running.train_member = train_member
    run_command("search", *words)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Twelve synthetic photos and a tiny frozen backbone."
    work = tmp_path_factory.mktemp("search")
    data = write_dataset(work / "data", n_photos=12, n_test=2, seed=2, height=64)
    return TrainConfig(data=data, out=work / "out", n_folds=2, backbone="test_vit",
                       backbone_weights=random_weights(work / "vit.safetensors"), tile_size=32,
                       freeze_backbone=True, epochs=1, cache_dir=work / "cache", device_type="cpu")


def start(config, out, processes=1, hangs_at=0, log="said"):
    "A search in its own process; its diary lies beside its folder."
    words = [*as_options(config), "--out", out, "--grid", 2, 2, "--no-use-aux-heads", "--trials", TRIALS]
    return Started(searching, out, processes, hangs_at, *words, log=out.with_name(f"{out.name}.{log}"))


def diary_of(out): return out.with_name(out.name + ".diary")


def diary(out):
    "(run folder, fold) -> how often it was begun, and how often done."
    path = diary_of(out)
    lines = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    return tuple(
        collections.Counter((run, fold) for run, fold, what, _ in lines if what == which)
        for which in ("begins", "done"))


def check_finished(out, said):
    "The study has its trials, all different, each trained once, and one process said which is best."
    table, found = pd.read_csv(out / "trials.csv"), json.loads((out / "search.json").read_text())
    assert len(table) == TRIALS == len(table[SEARCHED].drop_duplicates()) and set(table.columns) >= {
        "floor_constant", "floor_state"}
    folders = [p for p in (out / "trials").iterdir() if p.is_dir()]
    assert len(folders) == TRIALS
    assert table.trial[table.default].tolist() == [0], (
        "one process begins with what biomass_train would make of the options")
    again = 1 if found["best"] == found["default"] else 2
    assert all(n == 1 for n in diary(out)[1].values())
    assert len(diary(out)[1]) == 2 * (TRIALS + again), (
        "two folds of every trial, of the best and of the default")
    kept = [p for p in folders if list(p.glob("*/bundle"))]
    assert len(kept) == 1 and table.weighted_r2.max() == found["best"]["weighted_r2"]
    assert found["command"] in said
    assert ("optimistically biased" in said) == (again == 2), said
    oof = pd.read_csv(next(kept[0].glob("*/oof.csv")))
    score = weighted_r2(oof[list(TARGETS)], oof[[t + "_pred" for t in TARGETS]])
    assert abs(score - found["best"]["weighted_r2"]) < 1e-6
    assert {"best", "default", "difference"} <= set(found["fresh"]) and found["fresh"]["fold_seed"] > 0
    return table, found


def test_two_processes_share_one_study(tiny, tmp_path):
    out = tmp_path / "shared"
    both = [start(tiny, out, processes=2, log=f"said{i}") for i in range(2)]
    codes, text = [p.wait() for p in both], [p.said() for p in both]
    assert codes == [0, 0], text
    _, found = check_finished(out, "".join(text))
    trained = [set(re.findall(r"trial (\d+): grid|trial (\d+): head", t)) for t in text]
    assert all(trained) and not trained[0] & trained[1], "both took part, and no trial was begun by both"
    assert all(n == 1 for n in diary(out)[0].values())
    parsed = tyro.cli(TrainArgs, args=shlex.split(found["command"])[1:])
    assert {k: getattr(parsed, k) for k in SEARCHED} == {k: found["best"][k] for k in SEARCHED}
    assert parsed.grid == (2, 2) and not parsed.use_aux_heads


def test_a_killed_search_goes_on(tiny, tmp_path):
    out = tmp_path / "killed"
    first = start(tiny, out, hangs_at=4)
    in_its_second_fold = [4, 3]  # of the second trial
    first.wait_for(lambda: [sum(which.values()) for which in diary(out)] == in_its_second_fold)
    first.kill()
    assert len(list((out / "trials").glob("*/score.json"))) == 1
    second = start(tiny, out, log="said again")
    assert second.wait() == 0, second.said()
    table, found = check_finished(out, second.said())
    assert list(table.trial) == list(range(TRIALS)), "the killed trial was taken over under its number"
    begun = diary(out)[0]
    assert sorted(begun.values())[-2:] == [1, 2], "only the fold in which it was killed was begun twice"
    whole = start(tiny, tmp_path / "whole")
    assert whole.wait() == 0, whole.said()
    undisturbed, best = check_finished(tmp_path / "whole", whole.said())
    assert table.equals(undisturbed) and found["best"] == best["best"] and found["fresh"] == best["fresh"], (
        "it ends as an undisturbed search")


def test_only_search_needs_optuna():
    searching = {name for name, path in MODULES.items() if "optuna" in outside_imports(path)}
    assert [name.split(".")[-1] for name in searching] == ["search"], searching
    for path in CODE:
        at_once = own_imports(path, when_loaded(syntax(path))) & searching
        assert not at_once, f"{inside(path)} loads optuna when it is imported"
