"""Two blocks, two grids, two backbones, read by heads of every kind: from training to a folder's table."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import command, share
from conftest import assert_close
from ended_runs import Killed, left, quiet
from untrained import random_weights

from biomass_kit.data.folds import read_table
from biomass_kit.data.photos import list_photos
from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.targets import OWN_ENDS, TARGETS, BiomassError
from biomass_kit.evidence.probe import bundle_features
from biomass_kit.evidence.space import as_options as options
from biomass_kit.features.backbone import Backbone
from biomass_kit.features.options import STATISTICS
from biomass_kit.features.store import photo_batches
from biomass_kit.inference import bundle as bundles
from biomass_kit.inference.bundle import member_dims, read_bundle
from biomass_kit.inference.ensemble import Ensemble
from biomass_kit.inference.maps import photo_maps
from biomass_kit.inference.plan import plan_levels, plan_passes
from biomass_kit.inference.predict import predict_folder, some_members
from biomass_kit.model.options import HEADS
from biomass_kit.training import run as running
from biomass_kit.training.config import NEURAL, TrainConfig, check_config
from biomass_kit.training.run import train

RAW = [t + "_raw" for t in TARGETS]
ALL_SIX = "+".join(STATISTICS)
SETS = {
    "two blocks": dict(feature_blocks=(0.5, 0.75), pooling=ALL_SIX),
    "two grids": dict(also=("grid=3x1",)),
    "two backbones": dict(
        pooling="mean+std", also=("backbone=test_efficientnet,weights={other},size=48,grid=1x1",)),
}
every_set = pytest.mark.parametrize("of", SETS)
SURE = ("neural", "gaussian_process")  # heads that are trained here to say how sure they are
every_head = pytest.mark.parametrize("head", HEADS)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "Sixteen synthetic photos; the weights of a tiny transformer and of a tiny convolutional network."
    work = tmp_path_factory.mktemp("sets")
    write_dataset(work / "data", n_photos=16, n_test=3, seed=4, height=96)
    for name in ("test_vit", "test_efficientnet"): random_weights(work / f"{name}.safetensors", name)
    return work


@pytest.fixture(scope="module")
def base(work):
    "A frozen run of two folds whose features all runs here share."
    return TrainConfig(
        data=work / "data", out=work / "run", n_folds=2, backbone="test_vit",
        backbone_weights=work / "test_vit.safetensors", tile_size=32, freeze_backbone=True, epochs=2,
        tta=("plain", "h", "swap"), cache_dir=work / "cache", device_type="cpu", num_workers=0)


def with_set(config, of, head="neural", **more):
    "A config that reads a feature set with a head."
    also = tuple(text.format(other=config.data.parent / "test_efficientnet.safetensors")
                 for text in SETS[of].get("also", ()))
    neural = dict(epochs=TrainConfig.epochs) if head != "neural" else {}
    return dataclasses.replace(config, **{**SETS[of], "also": also, "head": head, **neural, **more})


@pytest.fixture(scope="module")
def trained(base, work):
    "Feature set and head -> the folder of their finished run, trained when first asked for."
    found = {}

    def of(name, head):
        key = f"{name} {head}".replace(" ", "-")
        if key not in found:
            config = with_set(base, name, head, out=work / "runs" / key)
            if head == "neural": config = dataclasses.replace(config, uncertainty=True)
            train(config, **quiet)
            found[key] = config.out
        return found[key]

    return of


@pytest.fixture
def passes(monkeypatch):
    "How many photos each call of a backbone saw."
    calls, plain = [], Backbone.forward
    monkeypatch.setattr(
        Backbone, "forward", lambda self, tiles: calls.append(len(tiles)) or plain(self, tiles))
    return calls


def agrees(config, rtol=1e-5):
    "The raw out-of-fold predictions of a run, which its bundle's own members repeat."
    bundle, found = read_bundle(config.out), []
    for m in bundle.members:
        rows = read_table(config.out / f"folds/{m['fold']}-oof.csv")
        alone = Ensemble(some_members(bundle, lambda other: other == m), device_type="cpu")
        found.append(alone.predict([config.data / p for p in rows.image_path]))
        np.testing.assert_allclose(found[-1], rows[RAW], rtol=rtol, atol=10 * rtol)
    return np.concatenate(found)


@every_head
@every_set
def test_a_bundle_predicts_what_training_scored(trained, of, head, work):
    "Each fold's own member, alone, on the photos that it was scored on: values and ends."
    run = trained(of, head)
    bundle = read_bundle(run)
    assert {m["schema"] for m in bundle.members} == {bundle.manifest["schema"]} == {3}
    for k in (0, 1):
        rows = read_table(run / f"folds/{k}-oof.csv")
        alone = some_members(bundle, lambda m: m["fold"] == k)
        assert len(alone.members) == 1
        paths = [work / "data" / p for p in rows.image_path]
        ends = head in SURE
        found = Ensemble(alone, device_type="cpu").predict(paths, intervals=ends)
        due = [rows[[t + suffix for t in TARGETS]] for suffix in ("_raw", *OWN_ENDS)[: 3 if ends else 1]]
        assert_close(found.reshape(len(rows), -1, 5), np.stack(due, 1))
        assert np.isfinite(rows[RAW]).all(axis=None)
    assert json.loads((run / "results.json").read_text())["photos"] == 16


@pytest.mark.parametrize("head", ["neural", "kernel_ridge", "gaussian_process"])
def test_a_folder_by_command(trained, work, tmp_path, head):
    "A plan, then a table with intervals and its report; and the run's report once more."
    run = trained("two backbones", head)
    words = ["--weights", run, "--photos", work / "data/test", "--device-type", "cpu"]
    planned = command("predict", *words, "--dry-run")
    assert planned.returncode == 0 and "4 backbone passes per photo" in planned.stdout, planned
    done = command("predict", *words, "--out", tmp_path / "t.csv", "--cache-dir", tmp_path / "cache")
    assert done.returncode == 0 and "no maps" not in done.stdout + done.stderr, done
    table = pd.read_csv(tmp_path / "t.csv")
    assert len(table) == 3 and table.likeness.between(0, 1).all() and table.flag.isna().all()
    assert (TARGETS[0] + "_low" in table) == (head in SURE), "too few dates for margins alone"
    if head in SURE:
        low, value, high = (table[[t + end for t in TARGETS]].to_numpy() for end in ("_low", "", "_high"))
        assert (low <= value).all() and (value <= high).all() and (low < high).any()
    page = (tmp_path / "t_report.html").read_text(encoding="utf-8")
    assert ("Maps are the mean" in page) == (head == "neural")
    again = command("report", run, "--device-type", "cpu")
    assert again.returncode == 0 and "no maps" not in again.stdout + again.stderr, again


def test_members_without_attention_are_skipped_in_maps(trained, work, passes):
    "No photo is read for heads that look nowhere; of two grids, both count."
    photos = list_photos(work / "data/test")
    ridge, neural = trained("two grids", "ridge"), trained("two grids", "neural")
    passes.clear()
    assert photo_maps(ridge, photos, device_type="cpu") == [{}] * 3 and not passes
    maps = photo_maps(neural, photos, device_type="cpu")
    assert [m["attention"].shape for m in maps] == [(6, 4)] * 3


def test_validating_with_a_feature_set(trained, work, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["--data", work / "data", "--device-type", "cpu", "--n-folds", 2, "--strategies", "group_date"]
    for of, head in (("two blocks", "kernel_ridge"), ("two backbones", "neural")):
        done = command("validate", "--weights", trained(of, head), *words)
        assert done.returncode == 0 and "group_date" in done.stdout, done
    photos = list_photos(work / "data/test")
    found = bundle_features(trained("two blocks", "ridge"), photos, device_type="cpu")
    assert found.shape == (3, 2, 4, 64 * 12)


def test_statistics_and_blocks_are_one_pass(base, work, tmp_path, passes):
    "Of all photos in four views, however many blocks and statistics; stored blocks are found by other runs."
    mine = dataclasses.replace(base, cache_dir=tmp_path / "cache", train_folds=(0,), epochs=60, head="ridge")

    def seen(name, **options):
        passes.clear()
        train(dataclasses.replace(mine, out=tmp_path / name, **options), **quiet)
        return sum(passes)

    once = 16 * 4
    assert seen("a", feature_blocks=(1, 3), pooling=ALL_SIX) == once
    assert seen("b", feature_blocks=(3,), pooling=ALL_SIX) == 0, "a block is stored by itself"
    assert seen("c", feature_blocks=(0.5, 1), pooling="mean+std") == once, "other statistics, another pass"
    assert seen("d", feature_blocks=(1, 4), pooling=ALL_SIX) == once, "a block that nobody stored"
    assert seen("e", feature_blocks=(3, 4, 1), pooling=ALL_SIX) == 0
    assert seen("f", pooling=ALL_SIX, feature_blocks=(3,), also=("blocks=4",)) == 0
    beside = ("blocks=2,pooling=max+mean", "blocks=5")
    assert seen("g", feature_blocks=(2,), pooling="mean", also=beside) == once, "three specs, one pass"
    assert seen("h", feature_blocks=(2,), pooling="max+mean") == 0, "and each is stored as if alone"


BESIDE = {  # what else a head that reads several specs may be asked for
    "stored draws": dict(stored_draws=1, augment="full"), "class teacher": dict(distill_aux=True),
    "best epoch": dict(checkpoint="best"), "half-size store": dict(cache_dtype="fp16"),
    "every head": dict(use_aux_heads=True, interval_head=True, two_part=True, uncertainty=True),
    "roots": dict(link="sqrt", log_targets="all", fusion="gated", symmetric=True),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_two_specs_beside_other_options(base, tmp_path, beside):
    config = with_set(base, "two backbones", out=tmp_path / "run", train_folds=(1,), **BESIDE[beside])
    photos = train(config, **quiet)["photos"]
    assert photos == len(agrees(config, 1e-3 if beside == "half-size store" else 1e-5))


def test_a_closed_head_teaches_a_neural_one(base, trained, tmp_path):
    "Each fold's members teach the same fold's pupil."
    teacher = trained("two backbones", "gaussian_process")
    taught = dataclasses.replace(base, out=tmp_path / "run", teacher=teacher)
    train(taught, **quiet)
    plain = dataclasses.replace(base, out=tmp_path / "plain")
    train(plain, **quiet)
    assert not np.allclose(read_table(taught.out / "oof.csv")[RAW], read_table(plain.out / "oof.csv")[RAW])


@pytest.fixture(scope="module")
def joined(base, work, trained):
    "Runs that differ in blocks, statistics and heads, joined by command."
    runs = [trained("two blocks", "kernel_ridge"), trained("two grids", "neural")]
    blocks = {"mean": (2, 5), "std+cls": (1,)}  # by pooling
    for pooling, read in blocks.items():
        more = dict(pooling=pooling, feature_blocks=read, out=work / "runs" / pooling)
        config = dataclasses.replace(base, epochs=TrainConfig.epochs, head="ridge", **more)
        train(config, **quiet)
        runs.append(config.out)
    done = command("bundle", *runs, "--out", work / "joint", "--no-report-photos")
    assert done.returncode == 0, done
    return runs


def test_a_joint_bundle_is_the_mean_of_its_parts(joined, work, passes):
    "Members that differ in blocks and statistics share a pass."
    photos = list_photos(work / "data/test")
    parts = np.mean([Ensemble(read_bundle(run), device_type="cpu").predict(photos) for run in joined], 0)
    passes.clear()
    joint = Ensemble(read_bundle(work / "joint"), device_type="cpu")
    assert_close(joint.predict(photos, batch_size=3), parts)
    # of the blocks on 2x2, of the output on 2x2 and on 3x1; plain and h
    assert passes == [3] * 3 * 2
    assert len(joint.bundle.members) == 8 and joint.bundle.manifest["schema"] == 3
    with pytest.raises(BiomassError, match="no interval"): joint.predict(photos, intervals=True)
    table = predict_folder(work / "joint", work / "data/test", work / "joint.csv", device_type="cpu")
    assert np.isfinite(table[list(TARGETS)]).all(axis=None) and (table.flag == "").all()
    assert all(m["attention"].shape == (6, 4) for m in photo_maps(work / "joint", photos, device_type="cpu"))


def test_stored_blocks_serve_a_joint_bundle(base, tmp_path, passes):
    "Two runs that stored a block each: the bundle of both asks for both in one pass, and finds them."
    runs = [dataclasses.replace(base, out=tmp_path / f"{block}", feature_blocks=(block,), pooling="max",
                                epochs=TrainConfig.epochs, head="ridge") for block in (5, 2)]
    for run in runs: train(run, **quiet)
    done = command("bundle", *(run.out for run in runs), "--out", tmp_path / "joint", "--no-report-photos")
    assert done.returncode == 0, done
    passes.clear()
    joint = Ensemble(read_bundle(tmp_path / "joint"), device_type="cpu", cache_dir=base.cache_dir)
    photos = list_photos(base.data / "train")
    found = joint.predict(photos)
    assert len(joint.passes) == 1 and passes == []
    parts = [Ensemble(read_bundle(run.out), device_type="cpu").predict(photos) for run in runs]
    assert_close(found, np.mean(parts, 0))


def test_runs_weighed_against_each_other(joined, work, tmp_path):
    done = command("bundle", *joined, "--out", tmp_path / "w", "--combine", "weighted", "--no-report-photos")
    assert done.returncode == 0, done
    bundle = read_bundle(tmp_path / "w")
    weights = bundle.manifest["combine"]["weights"]
    assert len(weights) == 8 and sum(weights) == pytest.approx(1)
    photos = list_photos(work / "data/test")
    parts = np.stack([Ensemble(read_bundle(run), device_type="cpu").predict(photos) for run in joined])
    shares = np.reshape(weights, (4, 2)).sum(1)
    assert_close(Ensemble(bundle, device_type="cpu").predict(photos), np.einsum("r,rnt->nt", shares, parts))


def test_a_plain_member_is_written_as_ever(base, tmp_path, monkeypatch):
    "Schema 1, or 2 with LoRA factors, as earlier libraries wrote; those refuse schema 3 by its number."
    plain = {"backbone", "bounds", "config", "file", "fold", "grid", "library", "means", "model", "name",
             "schema", "tile_size"}
    head = {"dim", "hidden_ratio", "dropout", "learning", "log_targets", "two_part", "uncertainty", "fusion",
            "symmetric", "density"}
    lora = dict(freeze_backbone=False, cache_dir=None, lora_rank=1)
    kinds = {1: {}, 2: lora, 3: dict(link="sqrt")}
    for schema, more in kinds.items():
        config = dataclasses.replace(base, out=tmp_path / f"{schema}", epochs=1, train_folds=(0,), **more)
        train(config, **quiet)
        manifest = read_bundle(config.out).manifest
        member = manifest["members"][0]
        assert manifest["schema"] == member["schema"] == schema
        if schema == 3: continue
        assert set(member) == plain and set(member["model"]) == head
        assert set(member["backbone"]) - {"lora"} == {"file", "name", "pooling", "blocks"}
    monkeypatch.setattr(bundles, "SCHEMAS", (1, 2))
    read_bundle(tmp_path / "2")
    with pytest.raises(BiomassError, match="schema 3, this biomass_kit .* reads 1 to 2; install biomass_kit"):
        read_bundle(tmp_path / "3")


def levels_of(*members):
    "Deadline levels of members, each the specs that it reads: (backbone, rows)."
    def spec(file, rows):
        return {"backbone": {"file": file, "pooling": "mean"}, "grid": [rows, 2], "tile_size": 32}

    described = [{"features": [spec(*s) for s in specs]} for specs in members]
    manifest = {"members": described, "files": {s[0]: {"bytes": 100} for specs in members for s in specs}}
    views = [*map(bundles.parse_view, ("plain", "h", "v"))]
    return described, views, plan_levels(manifest, views)


@pytest.mark.parametrize("members", [
    ((("a", 2), ("a", 3)), (("b", 1),)),
    ((("a", 2), ("a", 3)), (("a", 2),), (("b", 3), ("a", 2))),
    ((("a", 1), ("b", 1)), (("c", 1), ("d", 1)), (("e", 1), ("a", 1))),
    ((("a", 3), ("b", 2)),) * 3,
    ((("a", 1),), (("b", 2), ("c", 3)), (("c", 3),), (("d", 2), ("a", 1))),
])
def test_no_level_has_a_member_that_lacks_a_pass(members):
    "And every level is cheaper than the one before it, fewer views or fewer members."
    described, views, levels = levels_of(*members)
    whole = plan_passes(described, views)
    assert levels[0].members == tuple(range(len(members)))
    for level in levels:
        few = plan_passes([described[i] for i in level.members], list(level.views))
        assert level.work == sum(100 * 2 * p.spec.rows * 2 * 32**2 * len(p.views) for p in few)
        assert len(few) <= len(whole)
    for above, level in zip(levels, levels[1:]):
        assert above.work > level.work and (above.views, above.members) != (level.views, level.members)


def test_every_level_of_a_joint_bundle_predicts(joined, work):
    "What a deadline leaves is the mean of the members that are left."
    photos = list_photos(work / "data/test")
    whole = Ensemble(read_bundle(work / "joint"), device_type="cpu")
    assert len(whole.levels) > 2
    for level in whole.levels:
        loaded = next(photo_batches(photos, whole.requests, 3))
        grams, issues = whole.predict_loaded(loaded, photos, level)()
        names = {whole.bundle.members[i]["name"] for i in level.members}
        few = some_members(whole.bundle, lambda m: m["name"] in names)
        assert_close(grams, Ensemble(few, [str(v) for v in level.views], device_type="cpu").predict(photos))
        assert not issues


def training(config): train(config)


def test_two_processes_share_the_members(base, tmp_path):
    "And end with the bits of one."
    config = with_set(base, "two grids", "kernel_ridge")
    alone, both = (dataclasses.replace(config, out=tmp_path / name / "run") for name in ("alone", "both"))
    train(alone, **quiet)
    share(2, training, both, log=tmp_path / "said")
    assert left(both.out) == left(alone.out)


@pytest.mark.parametrize("of, head", [("two backbones", "neural"), ("two grids", "gaussian_process")])
def test_killed_it_goes_on_and_ends_with_the_same_bits(base, of, head, tmp_path, monkeypatch):
    "After an epoch, between two members, while features are stored; a second run gives the same bits too."
    from biomass_kit.training import finish, loop
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    config = with_set(base, of, head)
    whole, cut = (dataclasses.replace(config, out=tmp_path / name / "run") for name in ("whole", "cut"))
    train(whole, **quiet)
    places = [(running, "store_shared", 2), (finish, "save_member", 1), (finish, "write_csv", 1),
              (running, "finish_fold", 1)]
    if head == "neural": places.insert(1, (loop.Loop, "write", 2))
    for place, name, times in places:
        plain, calls = getattr(place, name), []

        def stop(*arguments, plain=plain, calls=calls, times=times):
            calls.append(plain(*arguments))
            if len(calls) == times: raise Killed
            return calls[-1]

        with monkeypatch.context() as patch:
            patch.setattr(place, name, stop)
            with pytest.raises(Killed): train(cut, **quiet)
    train(cut, **quiet)
    assert left(cut.out) == left(whole.out)


def test_a_run_is_told_by_every_spec_that_it_reads(base, tmp_path):
    "One that reads another block, size, grid or pooling beside is another run, whichever place it has."
    first = with_set(base, "two grids", "ridge", out=tmp_path / "run", also=("blocks=1", "blocks=2"))
    train(first, **quiet)
    for other in (("blocks=0", "blocks=2"), ("blocks=1", "blocks=3"), ("blocks=2", "blocks=1"), ("blocks=1",),
                  ("blocks=1", "blocks=2,pooling=mean"), ("blocks=1,size=48", "blocks=2")):
        with pytest.raises(BiomassError, match="holds a run with other"):
            train(dataclasses.replace(first, also=other), **quiet)
    same = ("blocks=1,grid=2x2", "blocks=2")
    train(dataclasses.replace(first, also=same), **quiet)


@pytest.mark.parametrize("head", [h for h in HEADS if h != "neural"])
def test_neural_options_are_refused_beside_a_closed_head(base, head):
    "Each of them, and what a closed head of another kind reads."
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2 + 0.1}
    named = dict(augment="flips", augment_size="tiles", fusion="none", loss_kind="mse",
                 target_weights="equal", teacher=Path("x"), average="ema", checkpoint="best",
                 head_lr_stage1=0.1)
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    closed = dataclasses.replace(base, head=head, epochs=60)
    check_config(closed)
    for name in (*NEURAL, "batch_size"):
        value = named.get(name) or other[type(defaults[name])](defaults[name])
        with pytest.raises(BiomassError, match=f"--{name.replace('_', '-')} is read only with --head neural"):
            check_config(dataclasses.replace(closed, **{name: value}))
    if head == "ridge":
        with pytest.raises(BiomassError, match="--kernel is read only with --head kernel_ridge"):
            check_config(dataclasses.replace(closed, kernel="linear"))


WRONG = {  # words -> what must be said
    ("--also", "grid=3"): "rows and columns",
    ("--also", "grid=3x3x3"): "'grid=3x3x3' is not one of grid=, size=, backbone=, weights=, pooling=, ",
    ("--also", "grid=0x2"): "rows and columns must be at least 1",
    ("--also", "gird=3x3"): "'gird=3x3' is not one of",
    ("--also", "3x3"): "'3x3' is not one of",
    ("--also", ""): "'' is not one of",
    ("--also", "blocks="): "'blocks=' is not one of",
    ("--also", "blocks=0.5/x"): "'blocks=0.5/x' is not one of",
    ("--also", "size=-4"): "--tile-size -4",
    ("--also", "grid=2x2,grid=3x3"): "each once",
    ("--also", "grid=2x2"): "each once",
    ("--also", "grid=3x3", "grid=3x3"): "each once",
    ("--also", "pooling=cls+magic"): "--pooling cls+magic",
    ("--also", "backbone=test_vitt"): "did you mean test_vit",
    ("--also", "backbone=test_efficientnet,weights=nowhere.safetensors"): "nowhere.safetensors: no such file",
    ("--also", "blocks=9"): "test_vit has blocks 0 to",
    ("--also", "grid=3x3", "--no-cache"): "--also reads features that are stored",
    ("--also", "grid=3x3", "--density", "--no-use-log-targets"): "--density adds up",
    ("--feature-blocks", "0.5", "0.52"): "each block of test_vit once",
    ("--feature-blocks", "1.5"): "a share of the depth lies in (0, 1]",
    ("--feature-blocks", "-1"): "has blocks 0 to",
    ("--feature-blocks", "2", "--pooling", "own"): "--pooling own is the pooling of the output",
    ("--pooling", "cls+cls"): "each once",
    ("--pooling", "mean+"): "--pooling mean+",
    ("--pooling", "auto+mean"): "--pooling auto+mean",
    ("--head", "ridge", "--epochs", "3"): "--epochs is read only with --head neural",
    ("--head", "ridge", "--seeds", "0", "1"): "--seed is read only with --head neural",
    ("--head", "ridge", "--no-freeze-backbone"): "learns from features that are stored",
    ("--head", "ridge", "--no-cache"): "learns from features that are stored",
    ("--head", "magic"): "--head",
    ("--scaler", "robust"): "--scaler is read only with a head in closed form",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_mistakes_at_the_command_line(base, words, tmp_path):
    plain = dataclasses.replace(base, out=tmp_path / "run", epochs=60, cache_dir=None)
    done = command("train", *options(plain), *words)
    assert done.returncode == 2 and WRONG[words] in done.stderr, done
    assert "Traceback" not in done.stderr and not (tmp_path / "run/config.json").exists()


def test_channels_are_those_of_what_is_read(trained):
    "Of each feature spec, in order."
    dims = {of: member_dims(read_bundle(trained(of, "ridge")).members[0]) for of in SETS}
    assert dims["two blocks"] == [64 * 6 * 2] and dims["two grids"] == [128, 128]
    assert dims["two backbones"][0] == 128 and len(dims["two backbones"]) == 2
