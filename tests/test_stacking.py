"""Weights of members for each target: found, shared, joined, and refused where they are nonsense."""
import json
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from test_hostile_bundles import manifest_of, predict, refused, small_bundle

from biomass_kit.command import ask
from biomass_kit.data.targets import TARGETS, WEIGHTS, BiomassError, combine
from biomass_kit.evidence.stacking import crossfit_stack, stack_weights
from biomass_kit.inference.bundle import MANIFEST, UNSIGNED, manifest_digest, read_bundle, write_manifest
from biomass_kit.inference.ensemble import Ensemble, combine_some
from biomass_kit.train import bundle, main

GOOD = [[1, 0.5, 0.25, 0, 0.1], [0, 0.5, 0.75, 1, 0.9]]  # of two members
RNG = np.random.default_rng(0)
Y = RNG.gamma(2.0, 10.0, (40, 5))
MEMBERS = Y + RNG.normal(size=(3, 40, 5)) * RNG.uniform(1, 20, (3, 1, 5))


def test_one_weight_per_member_as_ever():
    "The bits of the formula that knows no targets."
    errors = np.stack([(p - Y) * np.sqrt(WEIGHTS) for p in MEMBERS]).reshape(3, -1).T
    size = np.sqrt((errors**2).sum() / 3)
    u = nnls(np.vstack([errors / size, np.ones(3)]), np.r_[np.zeros(len(errors)), 1])[0]
    fold = np.arange(40) % 4
    assert (stack_weights(MEMBERS, Y) == u / u.sum()).all()
    weights = stack_weights(MEMBERS[:, fold != 1], Y[fold != 1])
    due = np.tensordot(weights, MEMBERS[:, fold == 1], 1)
    assert (crossfit_stack(MEMBERS, Y, fold)[fold == 1] == due).all()


def test_each_target_gets_the_least_squared_error_of_its_own():
    weights = stack_weights(MEMBERS, Y, per_target=True)
    mixtures = np.array([(a, b, 50 - a - b) for a in range(51) for b in range(51 - a)]) / 50
    for t in range(5):
        loss = ((mixtures @ MEMBERS[:, :, t] - Y[:, t]) ** 2).sum(1)
        own = ((weights[:, t] @ MEMBERS[:, :, t] - Y[:, t]) ** 2).sum()
        assert own <= loss.min() + 1e-9 and np.abs(mixtures[loss.argmin()] - weights[:, t]).max() < 0.05


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_target_that_does_not_vary_leaves_members_equal(value):
    y = Y.copy()
    y[:, 1] = value
    weights = stack_weights(MEMBERS, y, per_target=True)
    assert (weights[:, 1] == 1 / 3).all() and np.ptp(weights[:, [0, 2, 3, 4]], axis=0).min() > 0.1
    fold = np.arange(40) % 2
    y[fold == 0, 1] = Y[fold == 0, 1]  # fold 0 takes its weights from the others, where nothing varies
    found = crossfit_stack(MEMBERS, y, fold, per_target=True)[fold == 0, 1]
    assert_close(found, MEMBERS[:, fold == 0, 1].mean(0))


@pytest.mark.parametrize("members", [np.stack([Y, Y]), np.zeros((2, 40, 5)), np.stack([Y * 1e-9, Y * 1e6])])
def test_weights_are_finite_whatever_members_say(members):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = stack_weights(members, Y, per_target=True)
    assert np.isfinite(weights).all() and (weights >= 0).all() and np.allclose(weights.sum(0), 1)


one_row = st.lists(st.sampled_from([0.0, 1e-9, 0.5, 1.0, 7.0]), min_size=5, max_size=5)


@settings(deadline=None)
@given(st.lists(one_row, min_size=1, max_size=5), st.data())
def test_members_that_are_left_share_each_target(raw, data):
    "In the proportions that they had; alike where they had nothing."
    raw = np.array(raw)
    raw[0, raw.sum(0) == 0] = 1
    weights = raw / raw.sum(0)
    manifest = {"members": list(raw), "combine": {"how": "stacked", "weights": weights.tolist()}}
    left = tuple(sorted(data.draw(st.sets(st.integers(0, len(raw) - 1), min_size=1))))
    said = MEMBERS[np.arange(len(left)) % 3] + np.arange(len(left))[:, None, None]
    found = combine_some(said, left, manifest)
    for t in range(5):
        own = weights[list(left), t]
        share = own / own.sum() if own.sum() > 0 else np.full(len(left), 1 / len(left))
        assert_close(found[:, t], share @ said[:, :, t])


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    "A bundle of two members with weights for each target."
    folder = small_bundle(tmp_path_factory.mktemp("stacked") / "bundle")
    m = manifest_of(folder)
    write_manifest(
        folder, m["members"], m["physics"], m["views"], m["scores"], {"how": "stacked", "weights": GOOD})
    return folder


def test_a_bundle_mixes_each_target_by_itself(stacked):
    "And says what earlier libraries cannot read; a bundle without such weights does not."
    plain = read_bundle(stacked)
    assert plain.manifest["schema"] == 3 and {m["schema"] for m in plain.members} == {1, 2}
    apart = []
    for i in range(2):
        only = {"how": "weighted", "weights": [float(i == 0), float(i == 1)]}
        apart.append(predict(plain._replace(manifest=plain.manifest | {"combine": only})))
    due = combine(np.stack(apart)[:, 0], "stacked", GOOD)
    assert_close(predict(plain)[0], due)
    assert np.abs(apart[0] - apart[1]).max() > 1, "the members differ"


def nested(depth):
    value = 0.5
    for _ in range(depth): value = [value]
    return value


BAD = {  # name -> weights that two members cannot have
    "none": None,
    "one per member": [0.5, 0.5],
    "a row too few": GOOD[:1],
    "a row too many": [*GOOD, [0] * 5],
    "a column too few": [row[:4] for row in GOOD],
    "rows of several lengths": [GOOD[0], GOOD[1][:3]],
    "turned": np.transpose(GOOD).tolist(),
    "negative": [[-0.5, *GOOD[0][1:]], [1.5, *GOOD[1][1:]]],
    "twice as much": [[2 * w for w in row] for row in GOOD],
    "one column off": [[0.9, *GOOD[0][1:]], GOOD[1]],
    "NaN": [[float("nan"), *GOOD[0][1:]], GOOD[1]],
    "infinite": [[float("inf"), *GOOD[0][1:]], GOOD[1]],
    "both infinities": [[float("inf"), *GOOD[0][1:]], [float("-inf"), *GOOD[1][1:]]],
    "text": [[str(w) for w in row] for row in GOOD],
    "a text": "weights",
    "null": [[None, *GOOD[0][1:]], GOOD[1]],
    "truths": [[True] * 5, [False] * 5],
    "an integer beyond floats": [[7**500, *GOOD[0][1:]], GOOD[1]],
    "an object": {"0": GOOD[0], "1": GOOD[1]},
    "a number": 1,
    "deep": nested(40),
    "deeper": nested(200),
    "deep in a row": [[nested(200), *GOOD[0][1:]], GOOD[1]],
    "far too many": [[0.0] * 50_000] * 2,
}


@pytest.mark.parametrize("name", BAD)
def test_nonsense_in_place_of_weights_is_refused(stacked, name):
    "In one line of a length that can be read."
    path = stacked / MANIFEST
    before = path.read_bytes()
    combination = {"how": "stacked", "weights": BAD[name]}
    tampered = manifest_of(stacked) | {"combine": combination, "sha256": UNSIGNED}
    text = json.dumps(tampered)  # as it is: the kit's own JSON has null for NaN
    path.write_text(text.replace(UNSIGNED, manifest_digest(text.encode(), UNSIGNED), 1))
    try: said = refused(stacked)
    finally: path.write_bytes(before)
    assert "manifest.json: stacked: " in said and said.endswith("; pack the bundle again"), said
    assert len(said.replace(str(stacked), "")) < 400 and "\n" not in said
    read_bundle(stacked)


def test_nesting_that_json_cannot_read_is_refused(stacked):
    path = stacked / MANIFEST
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"weights": ', b'"weights": ' + b"[" * 100_000, 1))
    try: assert "not JSON" in refused(stacked)
    finally: path.write_bytes(before)


def test_weights_that_are_NaN_are_refused_for_one_per_member_too():
    with pytest.raises(BiomassError, match="must not be negative and must sum to 1"):
        combine(MEMBERS, "weighted", [0.5, 0.5, float("nan")])


@pytest.fixture(scope="module")
def joined(data, tmp_path_factory):
    "Two runs of two folds, stacked by command: their folder, and what the command said."
    work = tmp_path_factory.mktemp("joined")
    tiny = "--n-folds 2 --backbone test_vit --no-pretrained --tile-size 32 --epochs 1".split()
    for seed in (0, 1):
        options = [*tiny, "--device-type", "cpu", "--seed", seed, "--no-report-photos"]
        done = ask(main, "--data", data, *options, "--out", work / str(seed))
        assert done.code == 0, done.err
    done = ask(bundle, work / "0", work / "1", "--out", work / "both", "--combine", "stacked")
    assert done.code == 0, done.err
    return work, done.out


def test_the_command_says_a_run_s_weights_of_all_targets(joined):
    "As the bundle and the report hold them; each run's are shared by its two members."
    work, out = joined
    lines = [line for line in out.splitlines() if ", weights Dry_Green_g " in line]
    said = np.array([re.findall(r"_g (\d\.\d\d)", line) for line in lines], dtype=float)
    weights = np.array(read_bundle(work / "both").manifest["combine"]["weights"])
    assert said.shape == (2, 5) and np.abs(said.sum(0) - 1).max() < 0.011
    assert weights.shape == (4, 5) and np.abs(weights.reshape(2, 2, 5).sum(1) - said).max() < 0.006
    report = (work / "both/report.html").read_text(encoding="utf-8")
    assert all(f"Weight {t.lower().replace('_', ' ')}" in report for t in TARGETS)


def test_the_score_is_that_of_weights_from_other_folds(joined):
    each = [pd.read_csv(joined[0] / run / "oof.csv") for run in ("0", "1", "both")]
    raw = [oof[[t + "_raw" for t in TARGETS]].to_numpy() for oof in each]
    due = crossfit_stack(raw[:2], each[2][list(TARGETS)], each[2]["fold"].to_numpy(), per_target=True)
    assert_close(raw[2], due)


def test_photos_are_predicted_with_the_weights(joined, data):
    held = read_bundle(joined[0] / "both")
    photos = sorted((data / "test").glob("*.jpg"))[:2]
    ensemble = Ensemble(held, device_type="cpu")
    stacked, alone = ensemble.predict(photos), []
    for own in np.eye(4).tolist():
        only = {"how": "weighted", "weights": own}
        ensemble.bundle = held._replace(manifest=held.manifest | {"combine": only})
        alone.append(ensemble.predict(photos))
    assert_close(stacked, combine(alone, "stacked", held.manifest["combine"]["weights"]))
