"""The packed notebook: behind a cut network,
in a Python that knows the library only from the packed wheel."""
import dataclasses
import json
import os
import pickle
import shutil
import sys
import time
import venv
import zipfile

import pandas as pd
import pytest
from conftest import ROOT, SHARED, assert_close, run
from untrained import random_weights

from biomass_kit.data.files import file_digest, write_json
from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.table import check_submission
from biomass_kit.data.targets import BiomassError
from biomass_kit.inference.predict import predict_competition
from biomass_kit.kaggle import inference, packing, sessions
from biomass_kit.kaggle.inference import PREDICT_REQUIREMENTS, REFERENCE
from biomass_kit.kaggle.metadata import LIB, NOTEBOOK, WEIGHTS
from biomass_kit.kaggle.packing import pack, write_tracked
from biomass_kit.kaggle.sandbox import SOCKET_GUARD, knock, network_cut, run_offline, unrouted
from biomass_kit.kaggle.verify import verify
from biomass_kit.pack import main as biomass_pack
from biomass_kit.pack import verify as biomass_verify
from biomass_kit.training.config import TrainConfig
from biomass_kit.training.run import train


def printed(notebook):
    "All text that an executed notebook shows."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "".join("".join(o.get("text", "")) for c in cells for o in c.get("outputs", []))


def check(done, bundle, data, tmp_path):
    """What must hold after the notebook ran:
    a valid submission, equal to ours, and the reference photos as at packing."""
    here = predict_competition(bundle, data, tmp_path / "here.csv", device_type="cpu")
    there = check_submission(done["submission"], data)
    assert (here.sample_id == there.sample_id).all()
    assert_close(there.target, here.target)
    assert "as at packing" in printed(done["notebook"])
    assert "NOT as at packing" not in printed(done["notebook"])


def upload_instead(monkeypatch, folder, code, n_kept=None):
    "Let packing and its checks take an inference notebook of some or all of its cells and another one."
    notebook = json.loads((inference.NOTEBOOKS / NOTEBOOK).read_text(encoding="utf-8"))
    cell = {"cell_type": "code", "id": "another", "metadata": {}, "execution_count": None, "outputs": []}
    cells = [*notebook["cells"][:n_kept], cell | {"source": code}]
    copy = shutil.copytree(inference.NOTEBOOKS, folder / "notebooks", dirs_exist_ok=True)
    write_json(copy / NOTEBOOK, notebook | {"cells": cells})
    monkeypatch.setattr(packing, "NOTEBOOKS", copy)


def refused(call, *arguments, **options):
    "What a call that must be refused says."
    with pytest.raises(BiomassError) as e: call(*arguments, **options)
    return str(e.value)


@pytest.fixture(scope="module")
def packed(finished, tmp_path_factory):
    return pack(finished, tmp_path_factory.mktemp("packed") / "kaggle_datasets")


@pytest.fixture(scope="module")
def wheel(packed):
    "The library's wheel: building it takes longer than the rest of a packing."
    return next((packed / LIB).glob("*.whl"))


def test_the_packed_notebook_offline(packed, finished, data, tmp_path):
    "Both ways in which Kaggle mounts inputs; a submission equal to ours; figures with their margins."
    assert {p.suffix for p in packed.rglob("*") if p.is_file()} <= {
        ".json", ".whl", ".safetensors", ".ipynb", ".png", ".csv", ".md"}
    said = []
    report = verify(packed, data, tmp_path / "kept", share=True, say=said.append)
    assert [done["form"] for done in report["runs"]] == ["slug", "kind"]
    for done in report["runs"]:
        check(done, finished, data, tmp_path)
        assert done["attempts"] == 0 and 1e8 < done["memory"] < 4e9 and 0 < done["disk"] < 1e6
        assert done["seconds"] < 200
    text = "\n".join(said)
    limits = "of 9 h", "of 30 GB", "of 20 GB", "to spare"
    for word in (*limits, "numpy 2.0.2 ->", "network attempts: 0", done["network"]):
        assert word in text, text


def small_wheel(folder):
    "A wheel with one module, for any Python."
    path = folder / "quadrat_ruler-1.0-py3-none-any.whl"
    info = "quadrat_ruler-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("quadrat_ruler.py", "length = 70")
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: quadrat-ruler\nVersion: 1.0\n")
        kind = "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        z.writestr(f"{info}/WHEEL", kind)
        z.writestr(f"{info}/RECORD", "")
    return path


def test_own_photos_and_a_wheel_of_ones_own_by_command(finished, data, tmp_path, monkeypatch, capsys):
    """A wheel named with --wheels travels, is listed with its reason and installed;
    photos without a test.csv become a table of grams."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(small_wheel(tmp_path).parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    out = tmp_path / "kaggle_datasets"
    biomass_pack(["--weights", str(finished), "--out", str(out), "--user", "grass", "--no-verify",
                  "--wheels", "quadrat-ruler==1.0"])
    assert "quadrat_ruler-1.0-py3-none-any.whl: asked for with --wheels" in capsys.readouterr().out
    photos = tmp_path / "quadrats"
    for part in ("north", "south"): shutil.copytree(data / "test", photos / part)
    (photos / "south/broken.jpg").write_bytes(b"no photo")
    upload_instead(monkeypatch, tmp_path, "import quadrat_ruler\nprint('ruler', quadrat_ruler.length)")
    write_tracked(out, "grass")
    biomass_verify(
        ["--packed", str(out), "--photos", str(photos), "--out", str(tmp_path / "kept"), "--share",
         "--no-training"])
    assert "9 rows, valid" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "kept/kind/grams.csv")
    assert list(table.photo) == sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.jpg"))
    assert "ruler 70" in printed(tmp_path / "kept/kind/inference-executed.ipynb")
    assert pd.read_csv(tmp_path / "kept/kind/grams_issues.csv")["photo"].tolist() == ["south/broken.jpg"]
    with pytest.raises(SystemExit):
        biomass_pack(["--weights", str(finished), "--out", str(out), "--no-verify", "--wheels"])
    assert "Kaggle's image lacks nothing" in capsys.readouterr().err


def test_packing_again_gives_the_same_bytes(packed, finished, tmp_path, monkeypatch):
    "Elsewhere, later, from a bundle whose files have other times, under another umask."
    copy = shutil.copytree(finished / "bundle", tmp_path / "moved" / "bundle", copy_function=shutil.copyfile)
    for path in copy.iterdir(): os.utime(path, (1e9, 1e9))
    time.sleep(2.1)  # a zip file's clock ticks every two seconds
    old = os.umask(0o077)
    try: again = pack(copy, tmp_path / "again")
    finally: os.umask(old)

    def digests(folder):
        return {
            str(p.relative_to(folder)): file_digest(p) for p in folder.rglob("*") if p.is_file()}

    assert digests(again) == digests(packed)
    reference = {f"{WEIGHTS}/{REFERENCE}/0.png", f"{WEIGHTS}/{REFERENCE}/predictions.csv"}
    assert reference | {f"{WEIGHTS}/manifest.json", "README.md"} <= set(digests(packed))
    assert any(n.endswith(".whl") for n in digests(packed))


def test_weights_that_may_run_code_or_do_not_fit_are_refused(packed, wheel, finished, data, tmp_path):
    "By packing, by verifying and in the notebook's own call."
    def each(edit):
        bundle, there = (shutil.copytree(
            finished / "bundle", tmp_path / "b" / str(len(os.listdir(tmp_path))) / "bundle"),
                         shutil.copytree(packed, tmp_path / f"p{len(os.listdir(tmp_path))}"))
        edit(bundle), edit(there / WEIGHTS)
        return [refused(pack, bundle, tmp_path / "x", wheel=wheel), refused(
            verify, there, data, tmp_path / "y", share=True),
                refused(inference.predict_inputs, there / WEIGHTS, data, tmp_path)]

    for name in ("old.pt", "old.pth", "scaler.pkl", "head.bin", "last.ckpt", "model.joblib"):
        assert all(
            name in said and "remove it" in said for said in each(lambda f: (f / name).write_bytes(b"")))
    renamed = each(lambda f: (f / "notes.md").write_bytes(pickle.dumps(print)))
    assert all("notes.md" in said for said in renamed), "a pickle under another name"

    def manifest(**changes):
        return lambda f: (f / "manifest.json").write_text(
            json.dumps(json.loads((f / "manifest.json").read_text()) | changes))
    assert all("install biomass_kit 7.0 or later" in said for said in each(manifest(library="7.0")))
    assert all("schema 9" in said for said in each(manifest(schema=9)))
    assert all(
        "sha256 differs" in said
        for said in each(lambda f: [p.write_bytes(p.read_bytes()[:-1] + b"!") for p in f.glob("backbone-*")]))


def test_a_notebook_that_misbehaves_is_refused(wheel, finished, data, tmp_path, monkeypatch):
    """It is caught when it tries the network, though it hides the error,
    and when it writes where Kaggle lets nobody write."""
    def packed_with(code):
        upload_instead(monkeypatch, tmp_path, code, n_kept=2)
        return pack(finished, tmp_path / "misbehaves", wheel=wheel)

    hide = "try: {}\nexcept OSError: print('hidden')"
    tries = hide.format("socket.create_connection(('192.0.2.1', 80), timeout=2)")
    said = refused(run_offline, packed_with("import socket\n" + tries), data, tmp_path / "kept")
    assert "tried to reach the network" in said and "192.0.2.1" in said
    if network_cut():  # a process that the guard does not see, counted by the kernel
        program = "import socket; socket.create_connection((\"192.0.2.1\", 80), timeout=2)"
        quiet = f"subprocess.run([sys.executable, '-I', '-c', '{program}'], capture_output=True)"
        assert "no route" in refused(run_offline, packed_with(quiet), data, tmp_path / "kept")
    writes = packed_with("(next(inputs.rglob('test.csv')).parent / 'notes.txt').write_text('x')")
    if network_cut():
        said = refused(run_offline, writes, data, tmp_path / "kept")
        assert "Read-only file system" in said + printed_errors(tmp_path / "kept")
    monkeypatch.setattr("biomass_kit.kaggle.sandbox.network_cut", lambda: [])
    assert "wrote to its input" in refused(run_offline, writes, data, tmp_path / "kept")
    assert not (data / "notes.txt").exists()


def printed_errors(folder):
    "The errors that an executed notebook shows."
    cells = json.loads((folder / "inference-executed.ipynb").read_text(encoding="utf-8"))["cells"]
    return "".join(o.get("evalue", "") for c in cells for o in c.get("outputs", []))


def test_without_a_namespace_the_guard_is_enough(packed, finished, tmp_path, monkeypatch, capsys):
    "As biomass_pack verifies: over synthetic photos."
    monkeypatch.setattr("biomass_kit.kaggle.sandbox.network_cut", lambda: [])
    done = verify(packed, keep=tmp_path / "kept", share=True, forms=("kind",))["runs"][0]
    assert done["rows"] == 20 and done["network"].startswith("a guard") and done["attempts"] == 0
    assert done["input"].startswith("a copy")
    asked = []
    monkeypatch.setattr("biomass_kit.kaggle.verify.verify", lambda *a, **k: asked.append((a, k)))
    for switch in ("--share", "--no-verify"):
        biomass_pack(["--weights", str(finished), "--out", str(tmp_path / "packed"), switch])
    assert [(a, k["share"]) for a, k in asked] == [((tmp_path / "packed",), True)]
    assert "--user YOUR_KAGGLE_NAME" in capsys.readouterr().out


def test_the_whole_round_on_kaggle(wheel, tmp_path, capsys):
    """Packed without weights; training killed after one member, gone on with, equal to an undisturbed one.

    The bundle that it leaves is the inference notebook's input as it is, and gives a valid submission."""
    packed = pack(out=tmp_path / "packed", user="grass", wheel=wheel, say=lambda line: None)
    biomass_verify(["--packed", str(packed), "--out", str(tmp_path / "kept"), "--share"])
    said = capsys.readouterr().out
    assert "its bundle equals that of an undisturbed one" in said and "20 rows, valid" in said
    for words in ("goes on with ", "(1 finished already", "network attempts: 0", "floor_constant"):
        assert words in said, said
    kept = tmp_path / "kept/training"
    assert [p.name for p in (kept / "killed/run/folds").glob("?.json")] == ["0.json"]
    check_submission(kept / "inference/submission.csv", write_dataset(tmp_path / "same", 24, 4, 0, 96))
    other = dict(training=False, share=True)
    assert "its training must be proved" in refused(verify, packed, tmp_path / "same", **other)


def test_sessions_that_end_with_other_bits_are_refused(wheel, tmp_path, monkeypatch):
    "Bits are compared: one file that differs is named."
    packed = pack(out=tmp_path / "packed", user="grass", wheel=wheel, say=lambda line: None)
    digests = iter([{"bundle/manifest.json": "1", "oof.csv": end} for end in "23"])
    monkeypatch.setattr(sessions, "bundle_digests", lambda working: next(digests))
    monkeypatch.setattr(sessions, "run_notebook", lambda *a: None)
    said = refused(sessions.run_sessions, packed, tmp_path / "room", tmp_path / "kept", say=lambda line: None)
    assert "other bits" in said and "oof.csv" in said and "manifest" not in said


ATTEMPT = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=2)"


def test_the_cut_network_is_cut_and_attempts_are_counted(tmp_path):
    """A forbidden connection fails behind the namespace and behind the guard;
    both counters count, the loopback does not."""
    assert "failed, counted by the guard" in knock(tmp_path, network_cut())
    log = tmp_path / "log"
    for attempts in (1, 2):
        done = run(sys.executable, "-c", SOCKET_GUARD + ATTEMPT, env={**os.environ, "NETWORK_LOG": str(log)})
        assert "no network here" in done.stderr and len(log.read_text().splitlines()) == attempts
    loopback = (
        "import socket\ns = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(s.getsockname(), timeout=2)\nprint('reached')")
    there = {**os.environ, "NETWORK_LOG": str(log)}
    assert "reached" in run(sys.executable, "-c", SOCKET_GUARD + loopback, env=there).stdout
    assert len(log.read_text().splitlines()) == 2
    if network_cut():
        def count(code):
            return unrouted(
                run(*network_cut(), "sh", "-c", f"{sys.executable} -I -c \"{code}\"; cat /proc/net/snmp "
                                                "/proc/net/snmp6").stdout)

        assert count("pass") == 0 and count(ATTEMPT) == 1


@pytest.mark.long
def test_the_packed_notebook_in_an_environment_of_its_own(finished, data, tmp_path):
    """A fresh virtual environment with the listed requirements and a notebook runner,
    nothing shared with this one."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    done = run(
        python, "-m", "pip", "install", "--quiet", *PREDICT_REQUIREMENTS, "nbclient", "ipykernel",
        "--constraint", ROOT / "constraints.txt")
    assert done.returncode == 0, done.stderr[-2000:]
    names = {p["name"] for p in json.loads(run(python, "-m", "pip", "list", "--format", "json").stdout)}
    assert not names & {
        "albumentations", "scikit-learn", "accelerate", "tyro", "matplotlib", "nbdev", "biomass-kit",
        "biomass_kit"}
    done = run_offline(pack(finished, tmp_path / "packed"), data, tmp_path / "working", python)
    check(done, finished, data, tmp_path)
    assert "no picture of the predictions" in printed(done["notebook"]), (
        "without matplotlib there is no picture, and nothing else is lost")


@pytest.mark.parametrize(
    "size, learns", [(64, False), (64, True), pytest.param(1024, False, marks=pytest.mark.long)])
def test_a_backbone_with_rotary_positions(size, learns, wheel, tmp_path):
    """Of the class of vit_large_patch16_dinov3, on one tile a half: trained on random weights, packed, run
    offline.

    Frozen, and fine-tuned with all that names or counts a backbone's layers.
    """
    name, file = "vit_small_patch16_dinov3", tmp_path / "weights.safetensors"
    data = write_dataset(tmp_path / "data", n_photos=4, n_test=1, seed=3, height=96)
    random_weights(file, name, None)
    frozen = dict(freeze_backbone=True)
    tuned = dict(
        freeze_backbone=False, lora_rank=2, layer_decay=0.7, grad_checkpointing=True, backbone_lr=1e-3)
    config = TrainConfig(
        data=data, out=tmp_path / "run", backbone=name, backbone_weights=file, grid=(1, 1), tile_size=size,
        n_folds=2, train_folds=(0,), epochs=2, batch_size=4, tta=("plain", "h"), cache_dir=tmp_path / "cache",
        device_type="cpu", **(tuned if learns else frozen))
    train(config, log=lambda line: None)
    files = [p.name.partition("-")[0] for p in (config.out / "bundle").glob("*.safetensors")]
    assert files.count("backbone") == 1 and files.count("lora") == learns
    check(
        run_offline(pack(config.out, tmp_path / "packed", wheel=wheel), data, tmp_path / "working"),
        config.out, data, tmp_path)


FEATURE_SETS = {  # head, and what it reads
    "two grids": dict(head="kernel_ridge", also=("grid=1x1",)),
    "two backbones": dict(also=("backbone=test_vit,weights={vit},size=32,pooling=cls+std",), epochs=2),
}


@pytest.mark.parametrize("name", FEATURE_SETS)
def test_a_feature_set_offline(name, config, wheel, data, tmp_path):
    "A head in closed form on two grids, a neural one on two backbones: packed, and checked as for upload."
    vit = random_weights(tmp_path / "vit.safetensors")
    options = {"epochs": TrainConfig.epochs, "use_aux_heads": False, **FEATURE_SETS[name]}
    options["also"] = tuple(text.format(vit=vit) for text in options["also"])
    run = dataclasses.replace(config, out=tmp_path / "run", n_folds=2, **options)
    train(run, log=lambda line: None)
    packed = pack(run.out, tmp_path / "packed", wheel=wheel)
    report = verify(packed, data, tmp_path / "kept", share=True, forms=("kind",), say=lambda line: None)
    check(report["runs"][0], run.out, data, tmp_path)
    assert report["runs"][0]["attempts"] == 0


@pytest.mark.long
@pytest.mark.skipif(not (SHARED / "csiro").is_dir(), reason="needs the real photos in ../shared/csiro")
def test_real_photos_end_to_end(tmp_path):
    "A one-fold run on the real photos, packed, run offline over the public test photo."
    config = TrainConfig(data=SHARED / "csiro", out=tmp_path / "run", backbone="vit_small_patch14_dinov2",
                         tile_size=112, freeze_backbone=True, epochs=20,
                         backbone_weights=SHARED / "weights/vit_small_patch14_dinov2.safetensors",
                         train_folds=(0,), device_type="cpu")
    results = train(config, log=lambda line: None)
    assert results["photos"] == 16
    check(
        run_offline(pack(config.out, tmp_path / "packed"), SHARED / "csiro", tmp_path / "working"),
        config.out, SHARED / "csiro", tmp_path)
