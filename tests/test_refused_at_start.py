"""What cannot work is refused before anything is computed:
no backbone sees a photo, no run folder is claimed."""
import dataclasses
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from untrained import random_weights

from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.targets import BiomassError
from biomass_kit.features.backbone import Backbone
from biomass_kit.train import main as biomass_train
from biomass_kit.training.config import TrainConfig
from biomass_kit.training.run import train


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "Twelve synthetic photos of 128x64 pixels; weights of a tiny transformer with patches of 16."
    work = tmp_path_factory.mktemp("start")
    write_dataset(work / "data", n_photos=12, n_test=1, seed=2, height=64)
    random_weights(work / "vit.safetensors")
    return work


@pytest.fixture
def base(work, tmp_path, monkeypatch):
    "A sound frozen run, in which nobody may compute a feature."
    def forward(self, tiles): raise AssertionError("a backbone was run before the refusal")
    monkeypatch.setattr(Backbone, "forward", forward)
    return TrainConfig(data=work / "data", out=tmp_path / "run", n_folds=2, backbone="test_vit",
                       backbone_weights=work / "vit.safetensors",
                       tile_size=32, freeze_backbone=True, epochs=2, cache_dir=tmp_path / "cache",
                       device_type="cpu")


def refused(config, **options):
    "What is said; nothing is left but the lock."
    kept = config.cache_dir
    config = dataclasses.replace(config, **options)
    with pytest.raises(BiomassError) as e: train(config, log=lambda line: None)
    assert not (config.out / "config.json").exists() and not kept.exists()
    return str(e.value)


WRONG = {  # name -> (options, what must be said)
    "two stages of a frozen backbone": (
        dict(two_stage=True), "--two-stage trains the backbone in its second stage; drop it or "
                              "--freeze-backbone"),
    "a grid finer than patches": (
        dict(grid=(5, 5)), "whose halves are 64 pixels, would be smaller than a patch of 16; use at most 4 "
                           "rows and columns"),
    "one side alone too fine": (dict(grid=(1, 9)), "use at most 4 rows and columns"),
    "a tile of broken patches": (
        dict(tile_size=40), "use --tile-size 32, or leave the option out for the model's own"),
    "a tile of a size that no patch explains": (
        dict(backbone="xcit_nano_12_p16_224", backbone_weights=None, pretrained=False, freeze_backbone=False,
             tile_size=252),
        "use --tile-size 256, or leave the option out for the model's own 224"),
    "a name as the hub writes it": (dict(backbone="hf_hub:timm/test_vit"), "write --backbone test_vit;"),
    "more folds than groups": (dict(n_folds=200), "use 2 to "),
    "more folds than photos": (dict(n_folds=13, cv="random"), "the data has 12 groups; use 2 to 12 folds"),
    "one fold": (dict(n_folds=1), "use 2 to "),
    "a fold that is not there": (dict(train_folds=(2,)), "--train-folds 2: the folds are 0 to 1"),
    "folds of leave-one-out": (dict(cv="leave_one_state_out", n_folds=9), "each is a fold"),
    "a teacher that is none": (dict(teacher=Path("nowhere")), "nowhere"),
    "a data folder that is not there": (dict(data=Path("nowhere")), "nowhere: no such folder"),
    "weights of another backbone": (dict(backbone="test_vit2"), "does not fit test_vit2"),
    "LoRA of a frozen backbone": (dict(lora_rank=2), "--lora-rank is read only with"),
    "an option nobody reads": (dict(aux_month_weight=3.0), "--aux-month-weight is read only with"),
    "a weight of no head": (
        dict(aux_height_weight=3.0), "--aux-height-weight is read only with --use-aux-values"),
    "a head in closed form beside NDVI": (
        dict(head="ridge", use_aux_values=True), "--use-aux-values is read only with --head neural"),
    "blocks that are not there": (dict(feature_blocks=(99,)), "has blocks 0 to"),
    "the device is absent": (
        dict(device_type="mps" if not torch.backends.mps.is_available() else "cuda"), "this machine has no"),
    "a warm-up of everything": (dict(warmup=1.0), "--warmup 1.0: must lie in"),
    "draws without a cache": (
        dict(stored_draws=2, cache=False, cache_dir=None), "--stored-draws needs"),
    "a cache's place without a cache": (dict(cache=False), "--cache-dir is read only with the cache"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(base, name):
    options, words = WRONG[name]
    assert words in refused(base, **options)


def data_with(work, tmp_path, change):
    "The drawn data with another train.csv."
    shutil.copytree(work / "data", tmp_path / "data")
    change(pd.read_csv(tmp_path / "data/train.csv")).to_csv(tmp_path / "data/train.csv", index=False)
    return tmp_path / "data"


def test_one_date(base, work, tmp_path):
    "No fold can be made; and where two dates make two folds, none is left inside to choose an epoch on."
    one = data_with(work, tmp_path / "one", lambda t: t.assign(Sampling_Date="2015/9/4"))
    said = refused(base, data=one)
    assert "--cv group_date: the data has a single group, so nothing would be left to train on" in said
    photos = sorted(set(pd.read_csv(work / "data/train.csv").image_path))
    two = data_with(
        work, tmp_path / "two",
        lambda t: t.assign(
            Sampling_Date=["2015/9/4" if p in photos[:6] else "2015/9/5" for p in t.image_path]))
    assert "--checkpoint best: the training part has one sampling date" in refused(
        base, data=two, checkpoint="best")


def test_photos_that_are_smaller_than_others(base, work, tmp_path):
    """The smallest photo decides about the grid, and is named;
    a photo whose header cannot be read is named before any hour is spent."""
    data = data_with(work, tmp_path, lambda t: t)
    path = sorted((data / "train").iterdir())[7]
    Image.open(path).resize((96, 48)).save(path)
    assert f"a tile of {path}, whose halves are 48 pixels" in refused(base, data=data, grid=(4, 4))
    path.write_bytes(b"no photo")
    assert f"{path}: not a readable photo" in refused(base, data=data)


@pytest.mark.parametrize(
    "words", [("--two-stages",), ("--fusion", "magic"), ("--grid", "2"), ("--epochs", "many")])
def test_options_that_do_not_exist(words, tmp_path, capsys):
    "By the command, in words."
    with pytest.raises(SystemExit) as e:
        biomass_train(["--data", "d", "--out", str(tmp_path / "run"), *words])
    said = "".join(capsys.readouterr())
    assert e.value.code == 2 and words[0] in said and "Traceback" not in said
    assert not (tmp_path / "run").exists(), said
