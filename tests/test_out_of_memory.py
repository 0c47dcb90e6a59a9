"""A GPU that runs out of memory: a batch goes through the network in parts, said once, to the same result."""
import dataclasses
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from ended_runs import quiet

from biomass_kit.features.backbone import Backbone
from biomass_kit.model.model import BiomassModel
from biomass_kit.training.run import train

MOST = 3  # photos that fit
WAYS = {  # what differs from stored features
    "stored features": {},
    "backbone that learns": dict(
        freeze_backbone=False, cache_dir=None, augment="flips", backbone_lr=1e-3, backbone="test_vit",
        backbone_weights=None, pretrained=False, tile_size=32),
}


def full_beyond(plain):
    "The same forward pass, in memory for a few photos at once where gradients are kept."
    def forward(self, *inputs):
        if torch.is_grad_enabled() and len(inputs[0]) > MOST:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, *inputs)
    return forward


def trained(config):
    "A run's curve and predictions, and what was warned of."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(config, **quiet)
    said = [str(w.message) for w in caught if "out of memory" in str(w.message)]
    oof = pd.read_csv(config.out / "oof.csv").filter(like="_raw")
    return pd.read_csv(config.out / "history.csv").drop(columns="run"), oof, said


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_in_parts_is_the_same_batch(config, way, tmp_path, monkeypatch):
    "With MixUp, CutMix and masked heads; found out by the first member, and kept for the second."
    whole = dataclasses.replace(
        config, out=tmp_path / "whole", train_folds=(0, 1), epochs=2, batch_size=10, dropout=0.0, **WAYS[way])
    curve, oof, said = trained(whole)
    assert not said
    place = (Backbone if way == "backbone that learns" else BiomassModel)
    name = "forward" if place is Backbone else "outputs"
    monkeypatch.setattr(place, name, full_beyond(getattr(place, name)))
    parted, same, said = trained(dataclasses.replace(whole, out=tmp_path / "parts"))
    np.testing.assert_allclose(parted, curve, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(same, oof, rtol=1e-3, atol=1e-2)
    assert ["in 2 parts" in said[0], "in 4 parts" in said[1]] == [True, True] and len(said) == 2, said


def test_one_photo_that_does_not_fit_ends_the_run(config, tmp_path, monkeypatch):
    def never(self, *inputs): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(BiomassModel, "outputs", never)
    with pytest.raises(torch.OutOfMemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(dataclasses.replace(config, out=tmp_path / "run", train_folds=(0,)), **quiet)
