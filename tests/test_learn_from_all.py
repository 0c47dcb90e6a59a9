"""A member that learned from every photo predicts alone; the folds' members only give scores."""
import dataclasses

import pytest
from conftest import assert_close

from biomass_kit.data.folds import EVERY_FOLD
from biomass_kit.inference.bundle import read_bundle
from biomass_kit.inference.ensemble import Ensemble
from biomass_kit.inference.predict import some_members
from biomass_kit.training.run import train


@pytest.mark.parametrize(
    "options", (dict(use_aux_heads=True, epochs=2), dict(head="ridge")), ids=("neural", "ridge"))
def test_who_learned_from_all_photos_predicts_alone(config, data, tmp_path, options):
    plain = dict(use_aux_heads=False, epochs=type(config).epochs)
    mine = dataclasses.replace(config, **{**plain, **options}, learn_from="all", out=tmp_path / "run")
    results = train(mine, log=lambda line: None)
    bundle = read_bundle(mine.out)
    alone = some_members(bundle, lambda m: m["fold"] == EVERY_FOLD)
    assert results["photos"] == 30 and len(bundle.members) == 4 and len(alone.members) == 1
    ensemble = Ensemble(bundle, device_type="cpu")
    assert ensemble.levels[0].members == (3,)
    photos = sorted((data / "test").iterdir())
    assert_close(ensemble.predict(photos), Ensemble(alone, device_type="cpu").predict(photos))
