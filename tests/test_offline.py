"""The packed notebook: behind a cut network, in a Python that knows the library only from the packed wheel."""
import json
import socket
import sys
import venv

import numpy as np
import pytest
from conftest import ROOT, SHARED, run

from biomass_kit.data import check_submission
from biomass_kit.ensemble import predict_competition
from biomass_kit.kaggle import PREDICT_REQUIREMENTS, SOCKET_GUARD, network_cut, pack, run_offline


def printed(notebook):
    "All text that an executed notebook shows."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "".join("".join(o.get("text", "")) for c in cells for o in c.get("outputs", []))


def check(done, bundle, data, tmp_path):
    "What must hold after the notebook ran: a valid submission, equal to ours, and the reference photos as at packing."
    here = predict_competition(bundle, data, tmp_path / "here.csv", device_type="cpu")
    there = check_submission(done["submission"], data)
    assert (here.sample_id == there.sample_id).all() and np.abs(here.target - there.target).max() <= 1e-4
    assert "as at packing" in printed(done["notebook"]) and "NOT as at packing" not in printed(done["notebook"])


def test_the_packed_notebook_offline(finished, data, tmp_path):
    packed = pack(finished, tmp_path / "packed")
    assert {p.suffix for p in packed.rglob("*") if p.is_file()} <= {".json", ".whl", ".safetensors", ".ipynb", ".png", ".csv"}
    check(run_offline(packed, data, tmp_path / "working"), finished, data, tmp_path)


ATTEMPT = "import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)"


def test_the_cut_network_is_cut():
    "A connection that succeeds here fails behind the namespace, and behind the guard."
    with socket.create_server(("127.0.0.1", 0)) as server:
        attempt = ATTEMPT.format(port=server.getsockname()[1])
        assert run(sys.executable, "-c", attempt).returncode == 0
        assert run(sys.executable, "-c", SOCKET_GUARD + attempt).returncode != 0
        if network_cut(): assert run(*network_cut(), sys.executable, "-c", attempt).returncode != 0


@pytest.mark.long
def test_the_packed_notebook_in_an_environment_of_its_own(finished, data, tmp_path):
    "A fresh virtual environment with the listed requirements and a notebook runner, nothing shared with this one."
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    done = run(python, "-m", "pip", "install", "--quiet", *PREDICT_REQUIREMENTS, "nbclient", "ipykernel", "--constraint", ROOT / "constraints.txt")
    assert done.returncode == 0, done.stderr[-2000:]
    names = {p["name"] for p in json.loads(run(python, "-m", "pip", "list", "--format", "json").stdout)}
    assert not names & {"albumentations", "scikit-learn", "accelerate", "tyro", "matplotlib", "nbdev", "biomass-kit", "biomass_kit"}
    check(run_offline(pack(finished, tmp_path / "packed"), data, tmp_path / "working", python), finished, data, tmp_path)


@pytest.mark.long
@pytest.mark.skipif(not (SHARED / "csiro").is_dir(), reason="needs the real photos in ../shared/csiro")
def test_real_photos_end_to_end(tmp_path):
    "A one-fold run on the real photos, packed, run offline over the public test photo."
    from biomass_kit.train import TrainConfig, train

    config = TrainConfig(data=SHARED / "csiro", out=tmp_path / "run", backbone="vit_small_patch14_dinov2", tile_size=112, freeze_backbone=True, epochs=20,
                         backbone_weights=SHARED / "weights/vit_small_patch14_dinov2.safetensors", train_folds=(0,), device_type="cpu")
    results = train(config, log=lambda line: None)
    assert results["photos"] == 16
    check(run_offline(pack(config.out, tmp_path / "packed"), SHARED / "csiro", tmp_path / "working"), config.out, SHARED / "csiro", tmp_path)
