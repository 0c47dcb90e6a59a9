"""Members of schema 3 that were changed on the way: feature sets, and heads in closed form."""
import json
import resource
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save
from test_hostile_bundles import changed, manifest_of, resigned_file, rewritten_member, signed

from biomass_kit.data.synthetic import paint_photo
from biomass_kit.data.targets import BiomassError
from biomass_kit.features.backbone import build_backbone
from biomass_kit.inference.bundle import HEADER, read_bundle, save_backbone, save_member, write_manifest
from biomass_kit.inference.ensemble import Ensemble
from biomass_kit.inference.issues import Outcome
from biomass_kit.inference.predict import predict_photos, some_members
from biomass_kit.model.closed import GaussianProcess, KernelRidge, Ridge, photo_rows
from biomass_kit.model.model import BiomassModel

DIMS = [256, 64]  # two blocks by mean and deviation on two tiles; the class token of the output on one


def wide_bundle(folder):
    "One head of each kind; each reads two feature specs of one backbone together."
    torch.manual_seed(0)
    spec = dict(pretrained=False, tile_size=32)
    early, _ = build_backbone("test_vit", pooling="mean+std", blocks=(1, 3), **spec)
    late, _ = build_backbone("test_vit", pooling="cls", **spec)
    late.model.load_state_dict(early.model.state_dict())
    features = [
        {"backbone": save_backbone(folder, early), "grid": [1, 2], "tile_size": 32},
        {"backbone": save_backbone(folder, late), "grid": [1, 1], "tile_size": 32}]
    heads = {
        "neural": BiomassModel(DIMS, hidden_ratio=0.05, uncertainty=True), "ridge": Ridge(DIMS),
        "kernel_ridge": KernelRidge(DIMS), "gaussian_process": GaussianProcess(DIMS)}
    grams, seen = torch.rand(12, 5) * 50, [torch.randn(12, 2, 2, 256), torch.randn(12, 2, 1, 64)]
    heads["neural"].fit_output(grams)
    for kind, head in heads.items():
        if kind != "neural": head.fit(photo_rows(*seen), grams, np.arange(12) // 3)
    reads = dict(features=features, bounds=[[0.0] * 5, [200.0] * 5], means=[20.0] * 5, config={})
    infos = [save_member(folder, head, {**reads, "name": kind, "fold": k})
             for k, (kind, head) in enumerate(heads.items())]
    write_manifest(folder, infos, {"method": "none", "threshold": 0.15}, ["plain", "h"], {})
    return folder


@pytest.fixture(scope="module")
def wide_sound(tmp_path_factory): return wide_bundle(tmp_path_factory.mktemp("bundles") / "wide")


@pytest.fixture
def wide(wide_sound, tmp_path): return shutil.copytree(wide_sound, tmp_path / "wide")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "a.png"
    Image.fromarray(paint_photo((10, 5, 3), seed=0, height=64)).save(path)
    return path


NEURAL, RIDGE, KERNEL_RIDGE, PROCESS = range(4)


def only(folder, index):
    "The manifest lists this member alone, so that it contradicts no other."
    m = manifest_of(folder)
    signed(folder, members=m["members"][index:index + 1])
    return m["members"][index]


def model_with(index, **changes):
    "The arguments of a head changed, in a bundle of its member alone."
    return lambda f: rewritten_member(f, model=only(f, index)["model"] | changes)


def spec_with(index=RIDGE, place=0, **changes):
    "A member's feature spec changed; what is none of its own is its backbone's."
    def edit(folder):
        specs = manifest_of(folder)["members"][index]["features"]
        own = {name: v for name, v in changes.items() if name in specs[place]}
        specs[place] |= own
        specs[place]["backbone"] |= {name: v for name, v in changes.items() if name not in own}
        rewritten_member(folder, index, features=specs)
    return edit


def member_with(index=RIDGE, **changes): return lambda f: rewritten_member(f, index, **changes)


def first_spec_only(folder): rewritten_member(folder, features=only(folder, RIDGE)["features"][:1])


def specs_turned(folder): rewritten_member(folder, features=only(folder, RIDGE)["features"][::-1])


def renamed_backbone(folder):
    "Another name for the backbone, wherever it is named."
    for index in range(4):
        for place in (0, 1): spec_with(index, place, name="magic")(folder)


NO_FORM, NO_HEAD = "not as biomass_kit writes it", "cannot build its head"
NO_BACKBONE = "its backbone cannot be built"
UNLISTED = "names a file that the manifest does not list"
WIDE = {  # name -> (what somebody does who can sign, what must be said)
    "an unknown head": (member_with(head="magic"), "(head 'magic': biomass_kit"),
    "a head in a list": (member_with(head=["ridge"]), NO_HEAD),
    "no head": (member_with(head=None), NO_HEAD),
    "a neural head that is none": (member_with(head="neural"), NO_HEAD),
    "a closed head that is neural": (member_with(NEURAL, head="ridge"), NO_HEAD),
    "a ridge called a kernel": (member_with(head="kernel_ridge"), "its config asks for None"),
    "a process called a kernel": (member_with(PROCESS, head="kernel_ridge"), NO_HEAD),
    "a kernel called a process": (member_with(KERNEL_RIDGE, head="gaussian_process"), "has shape None"),
    "a ridge with intervals": (model_with(RIDGE, uncertainty=True), NO_HEAD),
    "a process without": (model_with(PROCESS, uncertainty=False), NO_HEAD),
    "no specs": (member_with(features=[]), "names 0 feature specs and channels of 2"),
    "specs that are none": (member_with(features=None), NO_FORM),
    "specs in words": (member_with(features="ab"), NO_FORM),
    "specs by name": (member_with(features={"a": {}, "b": {}}), NO_FORM),
    "numbers for specs": (member_with(features=[1, 2]), NO_FORM),
    "fewer specs than channels": (first_spec_only, "names 1 feature specs and channels of 2"),
    "fewer channels than specs": (model_with(RIDGE, dims=[256]), "names 2 feature specs and channels of 1"),
    "one number of channels": (model_with(RIDGE, dims=320), "names 2 feature specs and channels of 1"),
    "specs in another order": (specs_turned, "reads features of 256 channels, and test_vit gives 64"),
    "channels in words": (model_with(RIDGE, dims=["256", "64"]), NO_HEAD),
    "channels less than none": (model_with(RIDGE, dims=[-256, 64]), NO_HEAD),
    "channels beyond memory": (model_with(RIDGE, dims=[2**40, 64]), "its config asks for"),
    "channels beyond an address": (model_with(RIDGE, dims=[10**30, 64]), NO_HEAD),
    "parts of channels": (model_with(RIDGE, dims=[256.0, 64]), NO_HEAD),
    "neural channels in words": (model_with(NEURAL, dim=["256", "64"]), NO_HEAD),
    "neural channels beyond memory": (model_with(NEURAL, dim=[2**30, 64]), "its config asks for"),
    "neural channels that are none": (model_with(NEURAL, dim=None), "names 2 feature specs"),
    "a width that is none": (model_with(NEURAL, hidden_ratio=1e308), NO_HEAD),
    "a dropout of five": (model_with(NEURAL, dropout=5), NO_HEAD),
    "rows beyond memory": (model_with(KERNEL_RIDGE, rows=2**40), "its config asks for"),
    "rows beyond an address": (model_with(PROCESS, rows=2**62), NO_HEAD),
    "rows less than none": (model_with(KERNEL_RIDGE, rows=-1), NO_HEAD),
    "rows in words": (model_with(PROCESS, rows="12"), NO_HEAD),
    "rows of a ridge": (model_with(RIDGE, rows=12), NO_HEAD),
    "an unknown link": (model_with(RIDGE, link="cube"), "(link 'cube': choose one of identity, log1p, sqrt"),
    "an unknown neural link": (model_with(NEURAL, link="cube"), "(link 'cube': choose one of identity"),
    "an unknown scaler": (model_with(RIDGE, scaler="magic"), "(scaler 'magic': choose one of"),
    "an unknown kernel": (model_with(PROCESS, kernel="cosine"), "(kernel 'cosine': choose one of"),
    "unknown targets": (model_with(RIDGE, log_targets=["all"]), NO_HEAD),
    "an unknown statistic": (spec_with(pooling="mean+median"), "member ridge: --pooling mean+median: one of"),
    "a statistic twice": (spec_with(pooling="std+std"), "member ridge: --pooling std+std"),
    "no statistic": (spec_with(pooling=None), NO_FORM),
    "statistics in a list": (spec_with(pooling=["mean", "std"]), NO_FORM),
    "the model's own pooling of blocks": (spec_with(pooling="own"), NO_BACKBONE),
    "a block that is not there": (spec_with(blocks=[1, 99]), f"{NO_BACKBONE} (--feature-blocks 99: test_vit"),
    "fewer blocks": (spec_with(blocks=[3]), "reads features of 256 channels, and test_vit gives 128"),
    "a block in words": (spec_with(blocks=["1", "3"]), "member ridge reads blocks ['1', '3']"),
    "blocks in words": (spec_with(blocks="13"), "member ridge reads blocks 13"),
    "blocks less than none": (spec_with(blocks=[-1, 3]), "member ridge reads blocks [-1, 3]"),
    "a share of the depth": (spec_with(blocks=[0.5, 3]), "member ridge reads blocks [0.5, 3]"),
    "a block beyond an address": (spec_with(blocks=[1, 10**30]), NO_BACKBONE),
    "blocks that are none": (spec_with(blocks=None), NO_FORM),
    "an unknown backbone": (spec_with(name="test_vitt"), "read backbone-"),
    "an unknown backbone alone": (renamed_backbone, f"{NO_BACKBONE} (--backbone magic"),
    "a file outside": (spec_with(file="../x.safetensors"), UNLISTED),
    "an absolute file": (spec_with(place=1, file="/etc/passwd"), UNLISTED),
    "a number for a file": (spec_with(file=7), UNLISTED),
    "a member for a backbone": (spec_with(file="member-ridge.safetensors"), "weights do not fit test_vit"),
    "a row of tiles": (spec_with(grid=[2]), "reads [2] tiles of 32 pixels"),
    "a row of tiles that is so": (spec_with(grid=[True, 2]), "reads [True, 2] tiles of 32 pixels"),
    "a cube of tiles": (spec_with(grid=[1, 1, 2]), "reads [1, 1, 2] tiles of 32 pixels"),
    "tiles less than none": (spec_with(place=1, grid=[-1, -1]), "reads [-1, -1] tiles"),
    "tiles beyond memory": (spec_with(place=1, grid=[10**9, 10**9]), "tiles of 32 pixels"),
    "pixels beyond memory": (spec_with(place=1, tile_size=10**9), "tiles of 1000000000 pixels"),
    "pixels of no patch": (spec_with(tile_size=33), NO_BACKBONE),
}


@pytest.mark.parametrize("name", WIDE)
def test_tampering_with_feature_sets_and_heads_is_named(wide, name):
    "When the bundle is read, or before anything is predicted; nothing is allocated for it."
    edit, words = WIDE[name]
    edit(wide)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BiomassError) as e: Ensemble(read_bundle(wide), device_type="cpu")
    assert str(wide) in str(e.value) and words in str(e.value), str(e.value)
    assert len(str(e.value)) < 700 and "\n" not in str(e.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


def predicted(bundle, photo):
    "Grams and ends of a photo, whatever befalls members, and what is said of it."
    outcome = Outcome([photo.name])
    ends = all(m["model"].get("uncertainty") for m in bundle.members)
    grams = predict_photos(bundle, [photo], device_type="cpu", outcome=outcome, intervals=ends)
    assert np.isfinite(grams).all() and np.min(grams) >= 0
    return grams, outcome.issues.get(0)


SCALES = "centre", "gain", "label_mean"
KERNEL = *SCALES, "width", "rows", "dual"
ENDS = "alpha", "deviation", "inverse_factor"  # which intervals alone need
# head -> its tensors
HELD = {RIDGE: (*SCALES, "coefficients"), KERNEL_RIDGE: KERNEL, PROCESS: (*KERNEL, *ENDS)}


@pytest.mark.parametrize("index", HELD)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_tensors_without_a_number_fall_back(wide, photo, index, value):
    "A closed head whose tensors hold NaN is left out by name; infinity never gets out either."
    member = read_bundle(wide).members[index]
    tensors = load_file(wide / member["file"])
    assert set(tensors) == set(HELD[index])
    header = {HEADER: json.dumps(member, sort_keys=True)}
    beside = PROCESS if index != PROCESS else NEURAL
    for name, tensor in tensors.items():
        resigned_file(wide, member["file"], save(tensors | {name: torch.full_like(tensor, value)}, header))
        bundle = read_bundle(wide)
        alone, why = predicted(some_members(bundle, lambda m: m["fold"] == index), photo)
        _, beside_why = predicted(some_members(bundle, lambda m: m["fold"] in (index, beside)), photo)
        if not np.isnan(value): continue
        assert why.reason == "no member gave finite values" and np.allclose(alone.reshape(-1, 5)[0], 20)
        assert beside_why.reason == f"NaN or infinite values from {member['name']}"


@pytest.mark.parametrize("cases", [80, pytest.param(2000, marks=pytest.mark.long)])
def test_junk_in_a_signed_member_is_refused_or_harmless(wide, photo, cases):
    "Whatever stands in the place of a value in feature specs, head and arguments: no other error than ours."
    rng, plain, seen = np.random.default_rng(cases), manifest_of(wide)["members"], {"read": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(cases):
        index, part = int(rng.integers(4)), ("features", "features", "model", "head")[rng.integers(4)]
        junk = changed(plain[index][part], rng)
        try: rewritten_member(wide, index, **{part: junk})
        except ValueError: continue
        try:
            predicted(read_bundle(wide), photo)
            seen["read"] += 1
        except BiomassError as e:
            assert str(wide) in str(e), (part, junk, str(e))
            seen["refused"] += 1
        rewritten_member(wide, index, **plain[index])
    assert seen["refused"] > cases / 2, seen
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"
    predicted(read_bundle(wide), photo)
