"""Prediction asks for little: the imports that Kaggle must satisfy are the listed ones."""
import ast
import sys

import pandas as pd
from conftest import ROOT, imported_names, python

from biomass_kit.kaggle import PREDICT_REQUIREMENTS

PREDICT = """
import sys
from biomass_kit.kaggle import predict_competition
predict_competition({weights!r}, {data!r}, {out!r}, device_type="cpu")
loaded = lambda: sorted({{name.split(".")[0] for name in sys.modules}} & {unwanted!r})
print(loaded())
import tyro
print(loaded())
"""


def walk(module, seen):
    "All modules of the kit that `module` imports when it is imported, itself included."
    if module not in seen:
        seen.add(module)
        for name in top_imports(module):
            if name.startswith("biomass_kit."): walk(name.removeprefix("biomass_kit."), seen)
    return seen


def top_imports(module):
    "Imports at a module's top level; what a function imports when it is called is its own affair."
    tree = ast.parse((ROOT / "biomass_kit" / f"{module}.py").read_text(encoding="utf-8"))
    return imported_names(ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom, ast.Try))], []))


def test_imports_of_the_predict_path_are_the_listed_ones():
    allowed = {{"pillow": "PIL"}.get(r, r) for r in PREDICT_REQUIREMENTS} | {"torchvision"} | set(sys.stdlib_module_names) | {"biomass_kit"}
    rooms = walk("kaggle", set())
    assert {"ensemble", "bundle", "features", "model", "physics"} <= rooms and not rooms & {"train", "augment", "folds", "evidence", "report", "cli"}
    for room in rooms:
        strange = {n.split(".")[0] for n in top_imports(room)} - allowed
        assert not strange, f"{room} is on the predict path and imports {strange}"


def test_predicting_loads_nothing_else(finished, data, tmp_path):
    unwanted = {"sklearn", "scipy", "albumentations", "cv2", "accelerate", "tyro", "matplotlib", "nbdev",
                "fastcore", "IPython", "optuna", "peft", "pillow_heif"}
    code = PREDICT.format(weights=str(finished), data=str(data), out=str(tmp_path / "submission.csv"), unwanted=unwanted)
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(tmp_path / "submission.csv")) == 20
    predicted, seen = done.stdout.splitlines()[-2:]
    assert predicted == "[]", predicted
    assert seen == "['tyro']", "the check does not see what is loaded"
