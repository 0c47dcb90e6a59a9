"""A bundle adapted to one's own photos: where it helps, where it does not, and what hostile files get."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from commands import command
from conftest import assert_close
from safetensors.torch import load_file, save_file

from biomass_kit.data.files import file_digest
from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.table import read_train
from biomass_kit.data.targets import TARGETS, BiomassError, weighted_r2
from biomass_kit.inference.bundle import MANIFEST, read_bundle, sign_manifest
from biomass_kit.inference.card import CARD
from biomass_kit.inference.ensemble import Ensemble
from biomass_kit.inference.pooled import load_pooled, photo_groups
from biomass_kit.inference.predict import predict_photos
from biomass_kit.inference.uncertainty import has_intervals
from biomass_kit.kaggle.packing import copy_weights, pack
from biomass_kit.training.adapt import adapt
from biomass_kit.training.join import join_runs
from biomass_kit.training.own import Adapter, judge, left_out, own_rows
from biomass_kit.training.recipes import with_recipe
from biomass_kit.training.run import train

NEURAL = dict(use_aux_heads=False, epochs=60)  # what the shared config says of neural heads, put back
RECIPES = {  # recipe -> what differs: every kind of head, one member that is heard and several
    "quick": {}, "linear": {}, "probe": {}, "process": dict(head="gaussian_process"),
    "linear kernel": dict(kernel="linear")}


def quiet(line): pass


@pytest.fixture(scope="module")
def bundles(config, tmp_path_factory):
    "A function of a name in RECIPES: the bundle that was trained by it, once."
    work = tmp_path_factory.mktemp("closed")

    def made(name):
        out = work / name.replace(" ", "-")
        if not (out / "results.json").exists():
            base = replace(config, out=out, **NEURAL)
            base = with_recipe(base, name if name in ("quick", "linear", "probe") else "quick")
            train(replace(base, feature_blocks=(), pooling="auto", **RECIPES[name]), log=quiet)
        return read_bundle(out)
    return made


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    "A function of a change of grams: own photos with labels so changed."
    folder = write_dataset(tmp_path_factory.mktemp("farm") / "own", n_photos=16, n_test=1, seed=8, height=96)
    table = read_train(folder)

    def changed(change):
        grams = change(table[list(TARGETS)].to_numpy())
        return table.assign(**dict(zip(TARGETS, grams.T)))
    return changed


@pytest.fixture
def options(config): return dict(device_type="cpu", cache_dir=config.cache_dir)


def adapter_of(bundle, table, options):
    rows = own_rows(bundle, list(table["path"]), **options)
    return Adapter(bundle, rows, table[list(TARGETS)], photo_groups(table).numpy())


@pytest.mark.parametrize("name", RECIPES)
def test_every_kind_learns_a_heavier_sward(name, bundles, farm, options, tmp_path):
    "The rule finds a weight, the new bundle reads the own photos better, and is a bundle whole."
    bundle, table = bundles(name), farm(lambda grams: 2.5 * grams)
    verdict = adapt(bundle, table, tmp_path / "new", log=quiet, **options)
    assert verdict.helps
    new = read_bundle(tmp_path / "new")
    y, paths = table[list(TARGETS)].to_numpy(), list(table["path"])
    said = [predict_photos(b, paths, **options) for b in (bundle, new)]
    assert weighted_r2(y, said[1]) > weighted_r2(y, said[0]) + 0.2
    shown = pd.read_csv(tmp_path / "new/adapt.csv")
    np.testing.assert_allclose(shown[[t + "_before" for t in TARGETS]], said[0], rtol=1e-4, atol=1e-3)
    assert has_intervals(new) == has_intervals(bundle) and new.quadrat_cm == bundle.quadrat_cm
    assert len(load_pooled(new, new.trust["pooled"][0]).grams) == 46 == len(new.load_reference()["own"])
    assert "adapted to 16 photos" in (tmp_path / "new" / CARD).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RECIPES)
def test_the_quick_equations_are_the_fit_itself(name, bundles, farm, options, tmp_path):
    "What the rule compares is what the bundle that is written predicts."
    bundle, table = bundles(name), farm(lambda grams: 2.5 * grams)
    adapter = adapter_of(bundle, table, options)
    verdict = adapt(bundle, table, tmp_path / "new", log=quiet, **options)
    everybody = np.arange(len(table))
    due = adapter.finished(adapter.predict(everybody, verdict.weight, adapter.photos), everybody)
    found = predict_photos(tmp_path / "new", list(table["path"]), **options)
    np.testing.assert_allclose(found, due, rtol=1e-3, atol=0.02)


def test_no_photo_has_a_say_in_its_own_date(bundles, farm, options):
    "Another label of one date moves no prediction of that date, before or after."
    bundle, table = bundles("quick"), farm(lambda grams: 2.5 * grams)
    one = table["Sampling_Date"] == table["Sampling_Date"].iloc[0]
    other = table.copy()
    other.loc[one, list(TARGETS)] *= 1.7
    at = one.to_numpy()
    found = []
    for each in (table, other):
        adapter = adapter_of(bundle, each, options)
        verdict = judge(adapter)
        found.append((adapter.before[at], verdict.raw[at], verdict.weights[verdict.parts[at][0]]))
    for first, second in zip(*found): np.testing.assert_array_equal(first, second)


def test_useless_photos_leave_the_bundle_as_it_is(bundles, farm, options, tmp_path):
    "Labels that it reads right already, and dates that contradict each other."
    bundle = bundles("quick")
    right = adapter_of(bundle, farm(lambda grams: grams), options).before
    days = photo_groups(farm(lambda grams: grams)).numpy()
    sign = np.where(np.unique(days, return_inverse=True)[1] % 2, 3.0, 0.2)[:, None]
    for change in (lambda grams: right, lambda grams: grams * sign):
        said = []
        assert not adapt(bundle, farm(change), tmp_path / "none", log=said.append, **options).helps
        assert "does not help" in said[-1] and not (tmp_path / "none").exists()


def test_few_photos_and_one_date(bundles, farm, options, tmp_path):
    "One photo tells nothing; of one date, photos are left out one by one, and that is said."
    bundle, table = bundles("quick"), farm(lambda grams: 2.5 * grams)
    assert not adapt(bundle, table[:1], tmp_path / "none", log=quiet, **options).helps
    one_day = table.assign(Sampling_Date=table["Sampling_Date"].iloc[0])
    said = []
    verdict = adapt(bundle, one_day, tmp_path / "day", log=said.append, **options)
    assert len(set(verdict.parts)) == 10 and "of 1 date, each photo left out in turn" in said[0]
    undated = table.assign(Sampling_Date=pd.NaT)
    verdict = adapt(bundle, undated, tmp_path / "undated", log=said.append, **options)
    assert verdict.helps and "unknown dates" in said[-4]


def test_a_weight_is_that_many_photos(bundles, farm, options):
    "Own photos that count three times predict as own photos that are there three times."
    bundle, table = bundles("quick"), farm(lambda grams: 2.5 * grams)
    adapter = adapter_of(bundle, table, options)
    thrice = adapter_of(bundle, pd.concat([table] * 3, ignore_index=True), options)
    everybody = np.arange(16)
    parts = np.arange(16) % 4
    due = left_out(adapter, everybody, 3.0, parts)
    found = left_out(thrice, np.arange(48), 1.0, np.tile(parts, 3))
    assert_close(found[:16], due)


def test_the_same_photos_give_the_same_bytes(bundles, farm, options, tmp_path):
    bundle, table = bundles("quick"), farm(lambda grams: 2.5 * grams)
    for name in ("a", "b"): adapt(bundle, table, tmp_path / name, log=quiet, **options)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir()) and CARD in names
    for name in names: assert file_digest(tmp_path / "a" / name) == file_digest(tmp_path / "b" / name), name


def test_adapted_twice_and_photos_that_are_known(bundles, farm, options, tmp_path):
    "What was learned from already is left out; what is new is added to both."
    bundle, table = bundles("quick"), farm(lambda grams: 2.5 * grams)
    assert adapt(bundle, table[:10], tmp_path / "first", log=quiet, **options).helps
    said = []
    adapt(tmp_path / "first", table, tmp_path / "second", log=said.append, **options)
    assert said[0].startswith("10 photos of 16 left out")
    with pytest.raises(BiomassError, match="learned from all 10"):
        adapt(tmp_path / "first", table[:10], tmp_path / "none", log=quiet, **options)


def test_joined_runs_are_adapted_together(config, bundles, farm, options, tmp_path):
    "Each run's heads on its own features, as they are weighed."
    runs = [bundles(name).folder.parent for name in ("quick", "linear")]
    join_runs(runs, tmp_path / "both")
    both = read_bundle(tmp_path / "both")
    assert len(both.trust["pooled"]) == 2
    assert adapt(both, farm(lambda grams: 2.5 * grams), tmp_path / "new", log=quiet, **options).helps
    new = read_bundle(tmp_path / "new")
    assert [m["head"] for m in new.members] == ["kernel_ridge", "ridge"]
    assert sum(new.manifest["combine"]["weights"]) == pytest.approx(1)


def rewritten(folder, change, entry=None):
    "A copy of a bundle whose pooled features were tampered with, all digests made to fit."
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    told = manifest["trust"]["pooled"][0]
    tensors = load_file(folder / told["file"])
    change(tensors)
    save_file(tensors, folder / told["file"])
    size = (folder / told["file"]).stat().st_size
    manifest["files"][told["file"]] = {"sha256": file_digest(folder / told["file"]), "bytes": size}
    manifest["trust"]["pooled"][0] |= entry or {}
    sign_manifest(folder, manifest)
    return folder


HOSTILE = {
    "NaN rows": (lambda t: t["rows"].fill_(torch.nan), None, "nothing can be learned from"),
    "negative grams": (lambda t: t["grams"].sub_(1e6), None, "nothing can be learned from"),
    "a weight of zero": (lambda t: t["weight"].zero_(), None, "nothing can be learned from"),
    "fewer grams": (lambda t: t.update(grams=t["grams"][:3].clone()), None, "tensor grams has shape"),
    "fewer channels": (lambda t: t.update(rows=t["rows"][..., :3].clone()), None, "tensor rows has shape"),
    "a tensor more": (lambda t: t.update(code=torch.ones(1)), None, "tensor code has shape"),
    "other types": (lambda t: t.update(fold=t["fold"].double()), None, "nothing can be learned from"),
    "views of nobody": (lambda t: None, {"views": ["plain", "plain", "h", "v"]}, "cannot be used"),
    "views in words": (lambda t: None, {"views": 4}, "cannot be used"),
    "a strength below zero": (lambda t: None, {"members": "negative"}, "cannot be used"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_tampered_features_are_refused(name, bundles, farm, options, tmp_path):
    change, entry, words = HOSTILE[name]
    folder = shutil.copytree(bundles("quick").folder, tmp_path / "bundle")
    if entry and entry.get("members"):
        held = bundles("quick").trust["pooled"][0]["members"]
        entry = {"members": {name: {"alpha": -1.0, "width": 1.0} for name in held}}
    rewritten(folder, change, entry)
    read_bundle(folder)  # prediction reads none of it
    with pytest.raises(BiomassError, match=words) as e:
        adapt(folder, farm(lambda grams: grams), tmp_path / "new", log=quiet, **options)
    assert str(folder) in str(e.value)


def test_a_flipped_byte_and_a_stranger_are_found(bundles, tmp_path):
    folder = shutil.copytree(bundles("quick").folder, tmp_path / "bundle")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    path = folder / manifest["trust"]["pooled"][0]["file"]
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(BiomassError, match="sha256 differs"): read_bundle(folder)
    data[-5] ^= 4
    path.write_bytes(data)
    for entry in ({"file": "elsewhere.safetensors"}, {"members": {"nobody": {}}}):
        other = json.loads(json.dumps(manifest))
        other["trust"]["pooled"][0] |= entry
        sign_manifest(folder, other)
        with pytest.raises(BiomassError, match="pooled features names a file or a member"):
            read_bundle(folder)


def test_packed_without_features_predicts_alike_and_cannot_be_adapted(bundles, farm, options, tmp_path):
    bundle = bundles("quick")
    copy_weights(bundle, tmp_path / "packed", training_features=False)
    packed = read_bundle(tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("pooled-*")) and "pooled" not in packed.trust
    paths = list(farm(lambda grams: grams)["path"])
    said = [Ensemble(b, device_type="cpu").predict(paths) for b in (packed, bundle)]
    assert np.array_equal(*said)
    with pytest.raises(BiomassError, match="--no-training-features"):
        adapt(packed, farm(lambda grams: grams), tmp_path / "new", log=quiet, **options)


def test_nothing_to_leave_behind_is_said(finished, tmp_path):
    "An opt-out of what neural heads never had, before anything is emptied."
    with pytest.raises(BiomassError, match="holds none; drop it"):
        pack(finished, tmp_path / "packed", training_features=False)
    assert not (tmp_path / "packed").exists()


def test_the_card_may_be_edited_or_gone(bundles, tmp_path):
    "It is made from the manifest, and nothing depends on it."
    folder = shutil.copytree(bundles("quick").folder, tmp_path / "bundle")
    text = (folder / CARD).read_text(encoding="utf-8")
    for words in ("30 photos", "Dry_Clover_g", "floor_state", "kernel ridge", "license_name"):
        assert words in text
    (folder / CARD).write_bytes(b"\xff\x00 anything")
    read_bundle(folder)
    (folder / CARD).unlink()
    read_bundle(folder)


def test_the_command_ends_as_it_says(finished, bundles, data, options, tmp_path):
    "Neural heads are refused; the bundle's own photos are not its user's."
    words = ["--data", data, "--out", tmp_path / "new", "--device-type", "cpu"]
    words += ["--cache-dir", options["cache_dir"]]
    done = command("adapt", "--weights", finished, *words)
    assert done.returncode == 2 and "--recipe quick" in done.stderr
    done = command("adapt", "--weights", bundles("quick").folder, *words)
    assert done.returncode == 2 and "learned from all 30" in done.stderr
