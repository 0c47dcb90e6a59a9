"""Experiment trackers see what history.csv holds, whoever trained the member."""
import dataclasses

import numpy as np
import pandas as pd
import pytest
from conftest import launch
from ended_runs import quiet

from biomass_kit.data.targets import BiomassError
from biomass_kit.evidence.space import as_options as options
from biomass_kit.training.run import expand, train, train_runs
from biomass_kit.training.setup import LOGS


def tracked(folder):
    "tag -> {step: value} of what TensorBoard wrote under a folder."
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    seen = {}
    events = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    for run, tags in events.Runs().items():
        for tag in tags["scalars"]:
            seen.setdefault(tag, {}).update({e.step: e.value for e in events.Scalars(run, tag)})
    return seen


def check(folder, runs):
    "What was tracked is the history and the scores, to single precision."
    seen = tracked(folder / LOGS)
    for c in runs:
        history = pd.read_csv(c.out / "history.csv")
        for k, rows in history.groupby("fold"):
            found = seen[f"{c.out.name} fold {k}/loss"]
            assert list(found) == list(rows.epoch) and np.allclose(list(found.values()), rows.loss, rtol=1e-6)
        assert f"{c.out.name}/floor_state" in seen


def test_tensorboard_on_disk(config, finished, tmp_path):
    runs = expand(
        dataclasses.replace(config, out=tmp_path / "runs", trackers=("tensorboard",), train_folds=(0, 1)),
        ((1, 2), (2, 2)))
    train_runs(runs, **quiet)
    check(tmp_path / "runs", runs)
    assert not list(finished.rglob(LOGS)), "off unless asked for"
    train_runs(runs, **quiet)  # resumed with nothing left to do: only the scores again
    check(tmp_path / "runs", runs)


@pytest.mark.long
def test_members_of_other_processes_are_tracked_too(config, tmp_path):
    c = dataclasses.replace(config, out=tmp_path / "run", trackers=("tensorboard",))
    done = launch(2, "biomass_kit.train", *options(c))
    assert done.returncode == 0, done.stderr[-2000:]
    check(c.out, [c])


def test_a_tracker_that_is_not_installed_is_refused(config, tmp_path):
    with pytest.raises(BiomassError, match="pip install clearml"):
        train(dataclasses.replace(config, out=tmp_path / "run", trackers=("clearml",)), **quiet)
