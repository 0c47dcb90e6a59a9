"""It learns what is drawn, answers alike when asked twice, goes on after a kill, and shares its work among processes."""
import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from biomass_kit.data import file_digest
from biomass_kit.train import TrainConfig, train

BIN = Path(sys.executable).parent
quiet = dict(log=lambda line: None)


def members(folder): return {p.name: file_digest(p) for p in sorted((folder / "bundle").glob("*.safetensors"))}


def options(config: TrainConfig) -> list:
    "A config as command-line options (those that differ from the defaults)."
    out = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value == f.default: continue
        flag = "--" + f.name.replace("_", "-")
        out += [flag] if value is True else [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
    return out


def test_heads_on_frozen_features_beat_the_floors(config, tmp_path):
    "Even a random convolutional network passes colours on; a head that learns reads drawn pasture far above the floors."
    from biomass_kit.synthetic import write_dataset

    data = write_dataset(tmp_path / "data", n_photos=60, n_test=1, seed=5, height=96)
    results = train(dataclasses.replace(config, data=data, out=tmp_path / "run", use_aux_heads=False, epochs=60, cache_dir=tmp_path / "cache"), **quiet)
    score = {k: s["weighted_r2"] for k, s in results["scores"].items()}
    assert score["model"] > max(score["floor_constant"], score["floor_state"]) + 0.15, score


def test_shuffled_labels_teach_nothing(config, tmp_path):
    "With labels of other photos the out-of-fold score must not exceed the floor: nothing leaks into the scored fold."
    import shutil

    shutil.copytree(config.data, tmp_path / "data")
    table = pd.read_csv(tmp_path / "data/train.csv")
    photos = table.image_path.unique()
    partner = dict(zip(photos, np.random.default_rng(0).permutation(photos)))
    grams = table.set_index(["image_path", "target_name"]).target
    table["target"] = [grams[partner[p], t] for p, t in zip(table.image_path, table.target_name)]
    table.to_csv(tmp_path / "data/train.csv", index=False)
    results = train(dataclasses.replace(config, data=tmp_path / "data", out=tmp_path / "run", epochs=30, cache_dir=tmp_path / "cache"), **quiet)
    assert results["scores"]["model"]["weighted_r2"] < results["scores"]["floor_constant"]["weighted_r2"] + 0.1


def test_seed_decides_everything(config, finished, tmp_path):
    again = dataclasses.replace(config, out=tmp_path / "run", num_workers=2)
    train(again, **quiet)
    assert members(again.out) == members(finished) and (again.out / "oof.csv").read_bytes() == (finished / "oof.csv").read_bytes()
    other = dataclasses.replace(config, out=tmp_path / "other" / "run", seed=1, train_folds=(0,))
    train(other, **quiet)
    assert not set(members(other.out).items()) & {(k, v) for k, v in members(finished).items() if k.startswith("member")}


def test_a_killed_run_goes_on_and_ends_alike(config, finished, tmp_path):
    command = [str(BIN / "biomass_train"), *options(dataclasses.replace(config, out=tmp_path / "run"))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 120
    while not (tmp_path / "run/folds/0.json").exists() and process.poll() is None and time.time() < until: time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run/folds/0.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert members(tmp_path / "run") == members(finished) and (tmp_path / "run/oof.csv").read_bytes() == (finished / "oof.csv").read_bytes()


def test_two_processes_share_the_folds(config, finished, tmp_path):
    """`accelerate launch` with two processes on the CPU: each trains its own folds, each as one process would.

    It is called by its module, because the `accelerate` script imports timm, and with it torchvision, before us.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", "0", "-m", "biomass_kit.train", *options(dataclasses.replace(config, out=tmp_path / "run", cache_dir=tmp_path / "cache"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/results.json").exists()
    ours, theirs = (pd.read_csv(r / "oof.csv") for r in (tmp_path / "run", finished))
    columns = [c for c in ours.columns if c.endswith(("_pred", "_raw"))]
    assert np.abs(ours[columns] - theirs[columns]).to_numpy().max() < 1e-3
