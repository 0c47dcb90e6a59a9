"""The sources agree with each other: notebooks and library, README and index, packed files and their generator."""
import ast
import importlib
import json
import re
import shutil
import sys

import pytest
from conftest import ROOT, imported_names, python

sys.path.insert(0, str(ROOT / "tests"))
from render_readme import render

from biomass_kit.packing import KERNEL, write_tracked

ROOMS = sorted((ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"))
MODULES = sorted(p for p in (ROOT / "biomass_kit").glob("*.py") if not p.name.startswith("_"))


def imports_of(path):
    "Names of all modules that a file imports, anywhere in it."
    return imported_names(ast.parse(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The project's sources elsewhere, exported and cleaned again."
    room = tmp_path_factory.mktemp("copy")
    for name in ("settings.ini", "setup.py", "README.md"): shutil.copy(ROOT / name, room)
    for name in ("nbs", "biomass_kit"): shutil.copytree(ROOT / name, room / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for path in MODULES: (room / "biomass_kit" / path.name).unlink()
    calls = "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()"
    done = python("-c", calls, cwd=room)
    assert done.returncode == 0, done.stderr
    return room


def test_library_is_what_the_notebooks_export(copy):
    assert len(MODULES) == len(ROOMS)
    differ = [p.name for p in (ROOT / "biomass_kit").glob("*.py") if p.read_bytes() != (copy / "biomass_kit" / p.name).read_bytes()]
    assert not differ, f"run make prepare: {differ} are not what nbs/ exports"


def test_notebooks_are_clean(copy):
    dirty = [p.name for p in (ROOT / "nbs").rglob("*.ipynb")
             if ".ipynb_checkpoints" not in p.parts and p.read_bytes() != (copy / "nbs" / p.relative_to(ROOT / "nbs")).read_bytes()]
    assert not dirty, f"run make prepare: {dirty} are not clean"


def test_readme_is_what_the_index_says():
    assert render() == (ROOT / "README.md").read_text(encoding="utf-8"), "run make prepare"


def test_readme_shows_the_committed_ablation(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tests/benchmarks")
    importlib.import_module("ablation").main(["--table"])
    assert capsys.readouterr().out.strip() in (ROOT / "README.md").read_text(encoding="utf-8"), (
        "put what `ablation.py --table` prints into nbs/index.ipynb, then run make prepare")


def test_tracked_kaggle_files_are_what_packing_writes(tmp_path):
    user = json.loads((ROOT / "kaggle_datasets" / KERNEL / "kernel-metadata.json").read_text(encoding="utf-8"))["id"].split("/")[0]
    write_tracked(tmp_path, user)
    for made in (p for p in tmp_path.rglob("*") if p.is_file()):
        tracked = ROOT / "kaggle_datasets" / made.relative_to(tmp_path)
        assert tracked.read_text(encoding="utf-8") == made.read_text(encoding="utf-8"), (
            f"{tracked}: python -c 'from biomass_kit.packing import KERNEL, write_tracked; write_tracked(\"kaggle_datasets\")'")


def test_rooms_import_only_lower_rooms():
    number = {p.stem.split("_", 1)[1]: i for i, p in enumerate(ROOMS)}
    for path in MODULES:
        for name in imports_of(path):
            room = name.removeprefix("biomass_kit.") if name.startswith("biomass_kit.") else None
            entry = path.stem in ("train", "ensemble") and room == "cli"  # `python -m biomass_kit.train` hands over to the command line
            assert room is None or entry or number[room] < number[path.stem], f"{path.stem} ({number[path.stem]}) imports {room} ({number[room]})"


def test_library_needs_no_notebook_tools_and_loads_no_pickle():
    for path in MODULES:
        strange = {n.split(".")[0] for n in imports_of(path)} & {"fastcore", "nbdev", "IPython", "execnb"}
        assert not strange, f"{path.name} imports {strange}"
        assert not re.search(r"torch\.load|pickle\.load|allow_pickle=True", path.read_text(encoding="utf-8")), f"{path.name} loads a pickle"
