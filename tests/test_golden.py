"""Bundles that biomass_kit 0.2.0 wrote: they read and predict as they did then.

tests/golden/make.py says how they were made. Where one of these tests fails, the library has changed what
people get from bundles that they have: mend the library, not the files.
"""
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from biomass_kit.data.files import file_digest
from biomass_kit.inference.bundle import read_bundle
from biomass_kit.inference.predict import predict_competition, predict_folder

GOLDEN = Path(__file__).parent / "golden"
DATA = GOLDEN / "data"  # four synthetic photos in the layout of the competition
BUNDLES = ("frozen", "lora")
KINDS = ("submission", "folder")
QUADRAT_CM = (40.0, 60.0)  # that the folder's grams are asked for

every_bundle = pytest.mark.parametrize("name", BUNDLES)


def predicted(name: str, kind: str, out: Path) -> pd.DataFrame:
    "What biomass_predict says of the golden photos, with --data or --photos; a folder's table unrounded."
    options = dict(device_type="cpu", num_workers=0)
    if kind == "submission": return predict_competition(GOLDEN / name, DATA, out, **options)
    return predict_folder(GOLDEN / name, DATA / "test", out, quadrat_cm=QUADRAT_CM, **options)


@pytest.mark.skipif(
    hasattr(sys.modules.get("sitecustomize"), "TorchFinder"),
    reason="make test-last-bits: a played processor changes each layer by 1e-6 and these predictions by 2e-5",
)
@pytest.mark.parametrize("kind", KINDS)
@every_bundle
def test_predictions_are_those_of_then(name, kind, tmp_path):
    """To 1e-6; 2e-6 g, since a submission is rounded to 1e-6 g.

    Another number of threads changed nothing, and SSE4.1 or AVX2 in place of AVX-512 less than half of that.
    """
    found = predicted(name, kind, tmp_path / "table.csv")
    due = pd.read_csv(GOLDEN / f"{name}_{kind}.csv", keep_default_na=False)
    assert [*found] == [*due]
    numbers = due.select_dtypes("number").columns
    assert len(numbers) == (1 if kind == "submission" else 30 + ("likeness" in due))
    assert found.drop(columns=numbers).equals(due.drop(columns=numbers))
    np.testing.assert_allclose(found[numbers], due[numbers], rtol=1e-6, atol=2e-6)


@every_bundle
def test_files_are_those_of_then(name):
    "Every file by the digest that the manifest tells, and no other file."
    folder = GOLDEN / name
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert {p.name for p in folder.iterdir()} == {*files, "manifest.json"}
    for file, facts in files.items(): assert file_digest(folder / file) == facts["sha256"], file
    read_bundle(folder)  # the manifest's own digest, and whether all fits together
