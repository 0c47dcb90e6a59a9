"""What a person with a folder of photos reads:
values that add up, intervals of their own width, and kg/ha by the right area."""
import dataclasses
import json
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from biomass_kit.data.synthetic import paint_photo
from biomass_kit.data.targets import KG_HA, QUADRAT_CM, TARGETS, BiomassError, identity_residuals, kg_per_ha
from biomass_kit.evidence.space import as_options as options
from biomass_kit.features.backbone import build_backbone
from biomass_kit.inference.bundle import read_bundle, save_backbone, save_member, write_manifest
from biomass_kit.inference.physics import METHODS, PARTS, SUMS, error_covariance, reconcile
from biomass_kit.kaggle import predict_inputs
from biomass_kit.model.model import BiomassModel
from biomass_kit.predict import main as biomass_predict
from biomass_kit.train import bundle as biomass_bundle
from biomass_kit.train import main as biomass_train
from biomass_kit.training.setup import check_teacher

UPPER = [30.0, 25.0, 20.0, 45.0, 60.0]
MEANS = [20.0, 9.0, 5.0, 25.0, 34.5]  # of labels of which one misses its sum
G_AND_ENDS = [t + end for end in ("", "_low", "_high") for t in TARGETS]
KG_AND_ENDS = [t + end for end in ("", "_low", "_high") for t in KG_HA]


def contrary_bundle(folder, quadrat_cm=None, intervals=None, method="derive_dead"):
    "Untrained members whose five heads contradict each other and reach beyond the bounds."
    torch.manual_seed(1)
    body, size = build_backbone("test_vit", pretrained=False, tile_size=32)
    infos = []
    for fold in (0, 1):
        model = BiomassModel(body.dim)
        model.fit_output(torch.rand(20, 5) * torch.tensor([150.0, 5, 90, 120, 200]))
        config = {} if quadrat_cm is None else {"quadrat_cm": list(quadrat_cm)}
        info = dict(
            name=f"1x1-{fold}", fold=fold, backbone=save_backbone(folder, body), grid=[1, 1],
            tile_size=size, bounds=[[0.0] * 5, UPPER], means=MEANS, config=config)
        infos.append(save_member(folder, model, info))
    trust = intervals and {"intervals": {"level": 0.9, "of": "figures", **intervals}}
    write_manifest(folder, infos, {"method": method, "threshold": 0.15}, ["plain"], {}, trust=trust)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Three photos, one of them cut short."
    folder = tmp_path_factory.mktemp("own")
    for i in range(3):
        Image.fromarray(paint_photo((10 * i, 5, 3), seed=i, height=64)).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:900])
    return folder


def told(weights, photos, out, *words):
    "The table that `biomass_predict --photos` writes."
    asked = ["--weights", weights, "--photos", photos, "--out", out, "--device-type", "cpu", "--no-cache"]
    biomass_predict([*map(str, asked), "--no-report-photos", *map(str, words)])
    return pd.read_csv(out, keep_default_na=False)


def margins(**by_method): return {"margins": {m: [by_method.get(m, 0.5)] * 5 for m in METHODS}}


def test_values_of_a_folder_add_up_within_their_bounds(photos, tmp_path):
    """Read, unread (training means that miss their sum) and never negative;
    whatever the bundle does for a competition."""
    for method in ("none", "derive_dead"):
        weights = contrary_bundle(tmp_path / method, intervals=margins(), method=method)
        table = told(weights, photos, tmp_path / "table.csv")
        grams = table[list(TARGETS)].to_numpy()
        assert np.abs(identity_residuals(grams)).max() < 1e-3 and (grams >= 0).all()
        assert (grams <= np.array(UPPER) + 1e-3).all() and (np.abs(grams - UPPER) < 1e-3).any(), (
            "some value is at its bound")
        assert np.abs(identity_residuals(table[list(KG_HA)])).max() < 1e-2
        for t in TARGETS:
            assert (table[t + "_low"] <= table[t]).all() and (table[t] <= table[t + "_high"]).all()
        assert table.flag[1].startswith("training means") and np.abs(grams[1] - MEANS).max() < 0.5
        assert "add up: --physics project" in (tmp_path / "table_report.html").read_text()


def test_the_option_wins_over_the_folder_and_the_folder_over_the_bundle(photos, tmp_path):
    weights = contrary_bundle(tmp_path / "bundle", intervals=margins(project=0.2, derive_dead=0.7))
    by = {
        m: told(weights, photos, tmp_path / "table.csv", *(["--physics", m] if m else []))
        for m in (None, "project", "derive_dead", "none")}
    assert by[None].equals(by["project"]) and not np.allclose(
        by["none"][list(TARGETS)], by[None][list(TARGETS)])
    assert np.abs(identity_residuals(by["derive_dead"][list(TARGETS)])).max() > 1
    assert "need not add up" in (tmp_path / "table_report.html").read_text()
    for method, margin in ((None, 0.2), ("derive_dead", 0.7), ("none", 0.5)):
        read = by[method].loc[[0, 2]]
        assert np.allclose(np.sqrt(read.Dry_Total_g_high) - np.sqrt(read.Dry_Total_g), margin, atol=1e-4), (
            "intervals of the method used")
    notebook = predict_inputs(weights, photos, tmp_path, device_type="cpu")
    assert np.allclose(notebook[list(TARGETS)], by[None][list(TARGETS)], atol=1e-3), (
        "the Kaggle notebook gives the same table")


def test_a_threshold_that_nobody_reads_is_refused(photos, tmp_path, capsys):
    weights = contrary_bundle(tmp_path / "bundle")
    with pytest.raises(SystemExit): told(weights, photos, tmp_path / "t.csv", "--correction-threshold", 0.2)
    assert "read by --physics derive_dead alone, and this is project" in capsys.readouterr().err
    assert not (tmp_path / "t.csv").exists()
    told(weights, photos, tmp_path / "t.csv", "--physics", "derive_dead", "--correction-threshold", 0.2)


def test_kilograms_come_from_the_quadrat_trained_on(photos, tmp_path):
    "One's own quadrat changes grams and their intervals by its area, and nothing else."
    for name, trained in (("earlier", None), ("recorded", (70.0, 30.0)), ("square", (100.0, 100.0))):
        weights = contrary_bundle(tmp_path / name, trained, margins())
        assert read_bundle(weights).quadrat_cm == (trained or QUADRAT_CM)
        plain, own = (
            told(weights, photos, tmp_path / "t.csv", *words) for words in ([], ["--quadrat-cm", 50, 50]))
        area = 70 * 30 if name != "square" else 100 * 100
        assert np.allclose(plain[KG_AND_ENDS], plain[G_AND_ENDS] * 1e5 / area, atol=0.01)
        assert own[KG_AND_ENDS].equals(plain[KG_AND_ENDS]) and np.allclose(
            own[G_AND_ENDS], plain[G_AND_ENDS] * 2500 / area, atol=1e-3)
        assert np.allclose(own[list(KG_HA)], kg_per_ha(own[list(TARGETS)], (50, 50)), atol=0.01)
        report = (tmp_path / "t_report.html").read_text()
        assert "in a quadrat of 50 x 50 cm" in report
        assert ("trained on, 100 x 100 cm" if name == "square" else "trained on, 70 x 30 cm") in report


def test_an_earlier_bundle_says_whose_width_its_intervals_have(photos, tmp_path, capsys):
    weights = contrary_bundle(tmp_path / "bundle", intervals={"margin": [0.5] * 5})
    table = told(weights, photos, tmp_path / "t.csv").loc[[0, 2]]
    assert "measured on predictions of --physics derive_dead, not of project" in capsys.readouterr().out
    assert np.allclose(np.sqrt(table.GDM_g_high) - np.sqrt(table.GDM_g), 0.5, atol=1e-4)
    told(weights, photos, tmp_path / "t.csv", "--physics", "derive_dead")
    assert "not of" not in capsys.readouterr().out


def test_training_records_its_quadrat_and_none_is_mixed(finished, config, tmp_path, capsys):
    "Another one is another run; runs of two cannot be joined, nor one teach the other."
    run = tmp_path / "run"
    words = options(dataclasses.replace(config, out=run, epochs=1))
    biomass_train([*words, "--quadrat-cm", "50", "30", "--no-report-photos"])
    bundle = read_bundle(run)
    assert bundle.quadrat_cm == (50, 30)
    assert json.loads((run / "results.json").read_text())["config"]["quadrat_cm"] == [50, 30]
    assert set(bundle.manifest["physics"]["weighted_r2"]) == set(METHODS)
    assert set(bundle.margins) <= set(METHODS)
    assert read_bundle(finished).quadrat_cm == QUADRAT_CM, "the default, recorded too"
    capsys.readouterr()
    for command, said, what in (
        (biomass_train, words, "holds a run with other quadrat_cm ([50.0, 30.0] there, [70.0, 30.0] here)"),
        (biomass_bundle, [str(finished), str(run), "--out", str(tmp_path / "both")],
         "quadrats of 70 x 30 cm and 50 x 30 cm"),
        (biomass_train, [*words, "--quadrat-cm", "0", "30"],
         "--quadrat-cm 0 30: sides are in cm"),
    ):
        with pytest.raises(SystemExit): command(said)
        assert what in capsys.readouterr().err
    table = pd.read_csv(run / "folds.csv")
    with pytest.raises(BiomassError, match="quadrat of 50 x 30 cm, and --quadrat-cm is 70 x 30 cm"):
        check_teacher(run, table, table["fold"].to_numpy(), QUADRAT_CM)


def corners(upper):
    "The corners of what parts may be: every three limits that meet, where all others hold."
    c, d = np.concatenate([-np.eye(3), SUMS]), np.concatenate([np.zeros(3), upper])
    meet = [
        np.linalg.solve(c[list(on)], d[list(on)]) for on in combinations(range(8), 3)
        if abs(np.linalg.det(c[list(on)])) > 0.5]
    return np.array([b for b in meet if (c @ b <= d + 1e-9).all()])


def test_reconciled_rows_are_the_nearest():
    """From the nearest row every way into what is allowed leads away from the prediction.

    What is allowed is convex and has corners, so it is enough to look towards each of them.
    """
    rng = np.random.default_rng(3)
    for case in range(60):
        g, upper = rng.normal(20, 25, (20, 5)), rng.uniform(0, 60, 5) * (rng.random(5) > 0.1)
        covariance = None if case % 2 else error_covariance(
            np.zeros((30, 5)), rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5)) * 5)
        found = reconcile(g, covariance, upper)
        assert np.abs(identity_residuals(found)).max() < 1e-9 and (found >= 0).all()
        assert (found <= upper + 1e-6).all()
        weight = np.eye(5) if covariance is None else np.linalg.inv(covariance)
        downhill = (g - found) @ weight @ SUMS
        ahead = (corners(upper)[None] - found[:, None, list(PARTS)]) @ downhill[:, :, None]
        assert ahead.max() < 1e-6 * max(1, np.abs(downhill).max() * 60)
