"""Prediction asks for little: the imports that Kaggle must satisfy are the listed ones."""
import sys

import pandas as pd
from conftest import python
from sources import MODULES, PACKAGES, outside_imports, own_imports, syntax, when_loaded

from biomass_kit.kaggle.inference import PREDICT_REQUIREMENTS

PREDICT = """
import sys
from biomass_kit.kaggle import predict_competition
predict_competition({weights!r}, {data!r}, {out!r}, device_type="cpu")
loaded = lambda: sorted({{name.split(".")[0] for name in sys.modules}} & {unwanted!r})
print(loaded())
import tyro
print(loaded())
"""

BY_COMMAND = """
import sys
from biomass_kit.predict import main
words = ["--weights", {weights!r}, "--photos", {photos!r}, "--out", {out!r}, "--device-type", "cpu"]
for more in (["--no-report"], []):
    main([*words, "--no-cache", *more])
    print("loaded", sorted({{"albumentations", "matplotlib", "optuna"}} & {{*sys.modules}}))
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
    chapters = {module.partition(".")[0] for module in modules}
    assert chapters == {"", "data", "features", "model", "inference", "kaggle"}, "no others"
    not_needed = {"data.folds", "features.augment", "kaggle.packing"}
    assert not_needed <= {*MODULES} and not modules & not_needed
    for module in modules:
        path = {**MODULES, **PACKAGES}[module]
        strange = outside_imports(path, when_loaded(syntax(path))) - allowed
        assert not strange, f"{module} is on the predict path and imports {strange}"


def test_predicting_loads_nothing_else(finished, data, tmp_path):
    unwanted = {"sklearn", "scipy", "albumentations", "cv2", "accelerate", "tyro", "matplotlib", "nbdev",
                "fastcore", "IPython", "optuna", "peft", "pillow_heif"}
    code = PREDICT.format(
        weights=str(finished), data=str(data), out=str(tmp_path / "submission.csv"), unwanted=unwanted)
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(tmp_path / "submission.csv")) == 20
    predicted, seen = done.stdout.splitlines()[-2:]
    assert predicted == "[]", predicted
    assert seen == "['tyro']", "the check does not see what is loaded"


def test_the_command_loads_what_draws_for_its_report_alone(finished, data, tmp_path):
    "And neither what augments nor what searches."
    out = tmp_path / "grams.csv"
    done = python("-c", BY_COMMAND.format(weights=str(finished), photos=str(data / "test"), out=str(out)))
    assert done.returncode == 0, done.stderr
    loaded = [line for line in done.stdout.splitlines() if line.startswith("loaded ")]
    assert loaded == ["loaded []", "loaded ['matplotlib']"]
