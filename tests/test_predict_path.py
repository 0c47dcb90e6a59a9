"""Prediction asks for little: the imports that Kaggle must satisfy are the listed ones."""
import sys

import pandas as pd
from conftest import python
from sources import MODULES, PACKAGES, outside_imports, own_imports, syntax, when_loaded

from biomass_kit.kaggle import PREDICT_REQUIREMENTS

PREDICT = """
import sys
from biomass_kit.kaggle import predict_competition
predict_competition({weights!r}, {data!r}, {out!r}, device_type="cpu")
print(sorted({{name.split(".")[0] for name in sys.modules}} & {unwanted!r}))
"""


def loaded_with(module, seen):
    "All modules of the library that importing `module` loads, the packages it lies in and itself included."
    if module not in seen:
        seen.add(module)
        path = {**MODULES, **PACKAGES}[module]
        for name in own_imports(path, when_loaded(syntax(path))): loaded_with(name, seen)
        if module: loaded_with(module.rpartition(".")[0], seen)
    return seen


def test_imports_of_the_predict_path_are_the_listed_ones():
    required = {{"pillow": "PIL"}.get(r, r) for r in PREDICT_REQUIREMENTS}
    allowed = required | {"torchvision"} | set(sys.stdlib_module_names)
    modules = loaded_with("kaggle", set())
    assert {"ensemble", "bundle", "features", "model", "physics"} <= modules
    assert not modules & {"train", "augment", "folds", "evidence", "report", "cli"}
    for module in modules:
        path = {**MODULES, **PACKAGES}[module]
        strange = outside_imports(path, when_loaded(syntax(path))) - allowed
        assert not strange, f"{module} is on the predict path and imports {strange}"


def test_predicting_loads_nothing_else(finished, data, tmp_path):
    unwanted = {"sklearn", "scipy", "albumentations", "cv2", "accelerate", "tyro", "matplotlib", "nbdev",
                "fastcore", "IPython", "optuna", "peft", "pillow_heif"}
    code = PREDICT.format(weights=str(finished), data=str(data), out=str(tmp_path / "submission.csv"), unwanted=unwanted)
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(tmp_path / "submission.csv")) == 20 and done.stdout.strip().endswith("[]"), done.stdout
    assert "'sklearn'" in python("-c", "import sklearn" + code).stdout, "the check does not see what is loaded"
