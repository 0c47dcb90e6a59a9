"""Bundles that were changed on the way:
no flipped byte is missed, no tampering gets further than its name, nothing that runs code is loaded."""
import ast
import json
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sources import CODE, syntax

from biomass_kit.data.files import file_digest
from biomass_kit.data.targets import BiomassError
from biomass_kit.features.backbone import build_backbone
from biomass_kit.features.tta import DEFAULT_VIEWS
from biomass_kit.inference.bundle import (
    HEADER,
    MANIFEST,
    SINCE_LATER,
    read_bundle,
    save_backbone,
    save_lora,
    save_member,
    sign_manifest,
    write_manifest,
)
from biomass_kit.inference.card import CARD
from biomass_kit.inference.ensemble import Ensemble
from biomass_kit.model.model import BiomassModel


def small_bundle(folder):
    "Two members of a few kilobytes each on one backbone, the second with LoRA factors."
    torch.manual_seed(0)
    body, size = build_backbone("test_vit", pretrained=False, tile_size=32, pooling="cls")
    plain = save_backbone(folder, body)
    lora = save_lora(
        folder, {"blocks.0.attn.qkv.A": torch.randn(1, 64), "blocks.0.attn.qkv.B": torch.randn(192, 1)}, 1.0)
    infos = []
    for fold, reads in enumerate((plain, plain | lora)):
        model = BiomassModel(body.dim, hidden_ratio=0.01, learning=True)
        model.fit_output(torch.rand(20, 5) * 50)
        info = dict(
            name=f"2x2-{fold}", fold=fold, backbone=reads, grid=[2, 2], tile_size=size,
            bounds=[[0.0] * 5, [200.0] * 5], means=[20.0] * 5, config={"epochs": 3})
        infos.append(save_member(folder, model, info))
    write_manifest(
        folder, infos, {"method": "none", "threshold": 0.15}, DEFAULT_VIEWS, {"model": {"weighted_r2": 0.5}})
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory): return small_bundle(tmp_path_factory.mktemp("bundles") / "sound")


@pytest.fixture
def copy(sound, tmp_path): return shutil.copytree(sound, tmp_path / "bundle")


def refused(folder):
    "What is said of a bundle that must not be loaded."
    with pytest.raises(BiomassError) as e: read_bundle(folder)
    assert str(folder) in str(e.value)
    return str(e.value)


def manifest_of(folder): return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def flipped(path, at, by):
    "Refused with one byte changed; the byte is put back."
    with open(path, "r+b") as f:
        f.seek(at)
        was = f.read(1)[0]
        f.seek(at)
        f.write(bytes([was ^ by]))
    said = refused(path.parent)
    assert str(path) in said or MANIFEST in said, said
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(bytes([was]))


def test_sampled_flips_of_every_file_are_found(copy):
    "A hundred of each file, half of them in what is its header, most of single bits."
    rng = np.random.default_rng(0)
    files = sorted(path for path in copy.iterdir() if path.name != CARD)
    assert len(files) == 5 and {p.suffix for p in files} == {".json", ".safetensors"}
    for path in files:
        size = path.stat().st_size
        head = size if path.suffix == ".json" else min(
            size, 8 + struct.unpack("<Q", path.open("rb").read(8))[0])
        for n in range(100):
            flipped(
                path, int(rng.integers(head if n % 2 else size)),
                int(rng.integers(1, 256)) if n % 5 == 0 else 1 << int(rng.integers(8)))
    read_bundle(copy)


@pytest.mark.long
def test_every_byte_of_the_small_files(copy):
    """Manifest, members and LoRA factors, byte by byte, each by one bit;
    and each byte of the manifest to a blank, which JSON forgives."""
    rng = np.random.default_rng(1)
    for path in sorted(copy.iterdir()):
        if path.name.startswith("backbone-") or path.name == CARD: continue
        for at in range(path.stat().st_size): flipped(path, at, 1 << int(rng.integers(8)))
    for at, byte in enumerate((copy / MANIFEST).read_bytes()):
        if byte != ord(" "): flipped(copy / MANIFEST, at, byte ^ ord(" "))
    read_bundle(copy)


def test_blanks_and_doubled_keys_are_found(copy):
    "What JSON reads alike is not what was written."
    data = (copy / MANIFEST).read_bytes()
    others = (
        data.replace(b"\n", b" ", 1), data + b"\n", data.replace(b"{", b'{"views": [],', 1),
        data.replace(b"0.15", b"15e-2"), data[:-1])
    for other in others:
        assert other != data
        (copy / MANIFEST).write_bytes(other)
        assert "its own sha256 differs" in refused(copy)


def signed(folder, **changes): return sign_manifest(folder, manifest_of(folder) | changes)


def resigned_file(folder, name, data):
    "Another content of a file, with a digest that fits."
    (folder / name).write_bytes(data)
    m = manifest_of(folder)
    m["files"][name] = {"sha256": file_digest(folder / name), "bytes": len(data)}
    sign_manifest(folder, m)


def rewritten_member(folder, index=0, **changes):
    "A member that says something else of itself, in the manifest too."
    m = manifest_of(folder)
    member = m["members"][index] | changes
    save_file(
        load_file(folder / member["file"]), folder / member["file"],
        {HEADER: json.dumps(member, sort_keys=True)})
    m["members"][index] = member
    sign_manifest(folder, m)
    resigned_file(folder, member["file"], (folder / member["file"]).read_bytes())


def giant(folder, shape, end):
    "A safetensors file whose header claims a shape."
    name = manifest_of(folder)["members"][0]["backbone"]["file"]
    head = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    resigned_file(folder, name, struct.pack("<Q", len(head)) + head + b"\0" * 16)


def other_backbone(folder):
    "Members that read other weights than they were trained on."
    weights = {
        k: v for k,
        v in load_file(folder / manifest_of(folder)["members"][0]["backbone"]["file"]).items()
        if "blocks.5" not in k}
    data = __import__("safetensors.torch").torch.save(weights)
    resigned_file(folder, manifest_of(folder)["members"][0]["backbone"]["file"], data)


TAMPERED = {  # name -> (what somebody does who can sign, what must be said)
    "a file outside": (lambda f: signed(f, files={"../x.safetensors": {"sha256": "", "bytes": 1}}),
                       "refuses the file '../x.safetensors'; only .safetensors files beside the manifest"),
    "an absolute file": (
        lambda f: signed(f, files={"/etc/x.safetensors": {"sha256": "", "bytes": 1}}), "refuses the file "
                                                                                       "'/etc/x.safetensors'"),
    "a pickle by name": (
        lambda f: signed(f, files={"x.pt": {"sha256": "", "bytes": 1}}), "refuses the file 'x.pt'"),
    "a pickle inside": (
        lambda f: (f / "a.safetensors").write_bytes(pickle.dumps({"a": 1})), "a pickle, which runs code"),
    "a member's file outside": (lambda f: rewritten(
        f, lambda m: m["members"][0].update(file="../member.safetensors")),
                                "names a file that the manifest does not list"),
    "a giant shape": (lambda f: giant(f, [2**40, 2**20], 16), "not a safetensors file"),
    "a giant shape with its offsets": (lambda f: giant(f, [2**40], 2**42), "not a safetensors file"),
    "a giant header": (lambda f: resigned_file(
        f, manifest_of(f)["members"][0]["backbone"]["file"], struct.pack("<Q", 2**62) + b"{}"),
                       "not a safetensors file"),
    "an unknown field": (
        lambda f: signed(f, quantised=True), "field 'quantised' means nothing to biomass_kit"),
    "a newer schema": (
        lambda f: signed(f, schema=4, library="1.4"), "reads 1 to 3; install biomass_kit 1.4"),
    "a newer library": (lambda f: signed(f, library="99.0"), "install biomass_kit 99.0 or later"),
    "a missing field": (
        lambda f: rewritten(f, lambda m: m.pop("bounds")),
        "not as biomass_kit writes it (KeyError: 'bounds')"),
    "a missing member": (
        lambda f: (f / manifest_of(f)["members"][1]["file"]).unlink(),
        "missing, though the manifest lists it; copy the bundle again"),
    "no members": (lambda f: signed(f, members=[]), "lists no member"),
    "another's name for the backbone": (lambda f: rewritten_member(
        f, backbone=manifest_of(f)["members"][0]["backbone"] | {"name": "test_vit2"}),
                                        "as test_vit2 with 64 channels and as test_vit"),
    "another's channels": (lambda f: rewritten_member(
        f, model=manifest_of(f)["members"][0]["model"] | {"dim": 128}),
                           "with 128 channels and as test_vit with 64"),
    "a member that says otherwise": (
        lambda f: rewritten(f, lambda m: m["members"][0].update(fold=7)), "differs from the member's own "
                                                                          "header"),
    "a digest of another kind": (
        lambda f: (f / MANIFEST).write_text(json.dumps(manifest_of(f) | {"sha256": None})), "its own sha256 "
                                                                                            "differs"),
}


def rewritten(folder, change):
    m = manifest_of(folder)
    change(m)
    sign_manifest(folder, m)


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_named(copy, name):
    "Though every digest fits."
    edit, words = TAMPERED[name]
    edit(copy)
    assert words in refused(copy)


def test_what_shows_when_weights_are_loaded(copy, sound):
    """A backbone that is none, a head for another backbone,
    a head whose config asks for other or for giant tensors, or that a later library built."""
    other_backbone(copy)
    with pytest.raises(BiomassError, match="weights do not fit test_vit"):
        read_bundle(copy).load_backbone(read_bundle(copy).members[0])
    bundle = read_bundle(sound)

    def of(**changes): return {**bundle.members[0], "model": bundle.members[0]["model"] | changes}

    with pytest.raises(BiomassError, match="reads features of 128 channels, and test_vit gives 64"):
        bundle.load_backbone(of(dim=128))
    with pytest.raises(BiomassError, match="its config asks for"): bundle.load_model(of(dim=10**7))
    for changes in (dict(wings=2), dict(dim=10**40), dict(dim="64"), dict(fusion="magic")):
        with pytest.raises(BiomassError): bundle.load_model(of(**changes))


JUNK = (None, "", "x", -1, 0, 2**70, 1e308, float("nan"), [], {}, [[]], {"a": 1}, True, "../x", "9" * 5000)


def changed(value, rng):
    "A JSON value with one part of it replaced by junk, dropped, or doubled."
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return JUNK[rng.integers(len(JUNK))]
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, out = keys[rng.integers(len(keys))], value.copy()
    if rng.random() < 0.1: out.pop(key)
    else: out[key] = changed(value[key], rng)
    return out


@pytest.mark.parametrize("cases", [200, pytest.param(3000, marks=pytest.mark.long)])
def test_junk_in_a_signed_manifest_is_refused_or_harmless(copy, cases):
    """Whatever stands in the place of a value: no other error than ours;
    and what is read can be predicted with."""
    rng, plain, seen = np.random.default_rng(cases), manifest_of(copy), {"read": 0, "refused": 0}
    for _ in range(cases):
        junk = changed(plain, rng)
        try:
            if isinstance(junk, dict): sign_manifest(copy, junk)
            else: (copy / MANIFEST).write_text(json.dumps(junk))
        except ValueError: continue
        try: bundle = read_bundle(copy)
        except BiomassError as e:
            assert MANIFEST in str(e) or str(copy) in str(e)
            seen["refused"] += 1
            continue
        seen["read"] += 1
        try: predict(bundle)
        except BiomassError: pass
    assert seen["refused"] > cases / 2, seen


def predict(bundle):
    "A prediction on features, without photos."
    ensemble = Ensemble(bundle, device_type="cpu")
    views = {v for p in ensemble.passes for v in p.views}
    features = [{v: torch.zeros(1, 2, 4, 64) for v in views} for _ in ensemble.passes]
    return ensemble.combine(ensemble.predict_members(features).numpy()[None], ensemble.levels[0].members)


def test_bundles_of_earlier_libraries_are_read(copy):
    """No digest, no way of combining;
    member configs with fields that are gone, or without fields that came later."""
    rewritten_member(copy, config={"a_switch_of_old": 3})
    later = ("fusion", "symmetric", "density")
    model = {k: v for k, v in manifest_of(copy)["members"][1]["model"].items() if k not in later}
    rewritten_member(copy, 1, config={}, model=model)
    (copy / MANIFEST).write_text(
        json.dumps({k: v for k, v in manifest_of(copy).items() if k not in SINCE_LATER}))
    bundle = read_bundle(copy)
    assert np.isfinite(predict(bundle)).all() and bundle.members[0]["config"] == {"a_switch_of_old": 3}


def test_nothing_in_the_library_loads_or_runs_code():
    "No pickle reader, no eval, no exec; torch.nn.Module.eval is a method."
    readers = {
        ("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("joblib", "load"), ("np", "fromregex"),
        ("pd", "read_pickle"), ("pandas", "read_pickle"), ("yaml", "load"), ("marshal", "loads")}
    for path in CODE:
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), (
                    f"{path.name} line {node.lineno}")
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in readers, f"{path.name} line {node.lineno}"
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                assert ast.unparse(node.value) == str(node.arg == "weights_only"), (
                    f"{path.name} line {node.value.lineno}")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None)
                assert not {(module, a.name) for a in node.names} & readers, f"{path.name} line {node.lineno}"
                imported = {(module or a.name).split(".")[0] for a in node.names}
                assert not imported & {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}, (
                    f"{path.name} line {node.lineno}")
