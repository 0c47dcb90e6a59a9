"""The sources agree: notebooks and library, README and index, packed files and their generator."""
import ast
import json
import re
import shutil
from collections import defaultdict

import pytest
from conftest import python
from render_readme import render
from sources import (
    CODE,
    EXPORTING,
    MODULES,
    NOTEBOOKS,
    PACKAGES,
    ROOT,
    exported_as,
    inside,
    known_to_git,
    outside_imports,
    own_imports,
    syntax,
    walk,
)

from biomass_kit.kaggle.metadata import KERNEL
from biomass_kit.kaggle.packing import write_tracked

HANDS_ON = "kaggle"  # its `__init__` hands on what notebooks that were uploaded long ago import


@pytest.mark.parametrize("folder, suffix", [("biomass_kit", ".py"), ("nbs", ".ipynb"), ("tests", ".py")])
def test_every_file_that_git_knows_is_seen(folder, suffix):
    "All tests that read sources read these lists, so what they miss is tested by none."
    try:
        known = known_to_git(folder, suffix)
    except LookupError as reason:
        pytest.skip(f"nothing to compare with: {reason}")
    missed = sorted(map(inside, known - {*walk(folder, suffix)}))
    assert known and not missed, f"walk() in tests/sources.py does not see {missed}"


def test_one_notebook_makes_one_module():
    made = [exported_as(path) for path in EXPORTING]
    assert len({*made}) == len(made), "two notebooks export one module"
    assert not {*MODULES} - {*made}, f"no notebook exports {sorted({*MODULES} - {*made})}"
    assert not {*made} - {*MODULES}, f"run make prepare: {sorted({*made} - {*MODULES})} are not exported"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The project's sources elsewhere, exported and cleaned again."
    work = tmp_path_factory.mktemp("copy")
    for name in ("settings.ini", "setup.py", "README.md"): shutil.copy(ROOT / name, work)
    left_behind = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "biomass_kit"): shutil.copytree(ROOT / name, work / name, ignore=left_behind)
    for path in MODULES.values(): (work / path.relative_to(ROOT)).unlink()
    export = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    for call in (export, "from nbdev.clean import nbdev_clean; nbdev_clean()"):
        done = python("-c", call, cwd=work)
        assert done.returncode == 0, done.stderr
    return work


def test_library_is_what_the_notebooks_export(copy):
    again = {inside(p): (copy / inside(p)).read_bytes() for p in walk("biomass_kit", ".py")}
    differ = [name for name, made in again.items() if made != (ROOT / name).read_bytes()]
    assert not differ, f"run make prepare: {differ} are not what nbs/ exports"


def test_notebooks_are_clean(copy):
    dirty = [inside(p) for p in NOTEBOOKS if p.read_bytes() != (copy / inside(p)).read_bytes()]
    assert not dirty, f"run make prepare: {dirty} are not clean"


def test_readme_is_what_the_index_says():
    assert render() == (ROOT / "README.md").read_text(encoding="utf-8"), "run make prepare"


def test_tracked_kaggle_files_are_what_packing_writes(tmp_path):
    metadata = ROOT / "kaggle_datasets" / KERNEL / "kernel-metadata.json"
    user = json.loads(metadata.read_text(encoding="utf-8"))["id"].split("/")[0]
    write_tracked(tmp_path, user)
    for made in (p for p in tmp_path.rglob("*") if p.is_file()):
        tracked = ROOT / "kaggle_datasets" / made.relative_to(tmp_path)
        assert tracked.read_text(encoding="utf-8") == made.read_text(encoding="utf-8"), (
            f"{tracked}: biomass_kit.kaggle.packing.write_tracked('kaggle_datasets') writes another")


def test_notebooks_are_named_as_their_modules():
    "`3_photos` in the folder `1_data` exports `data.photos`; that of the commands, the last, `train`."
    last = EXPORTING[-1].parent
    for path in EXPORTING:
        chapter = "" if path.parent in (ROOT / "nbs", last) else path.parent.name.partition("_")[2] + "."
        due = chapter + path.stem.partition("_")[2]
        assert exported_as(path) == due, f"{inside(path)} exports {exported_as(path)}, not {due}"


def ranks():
    """Where each module stands in the order of the notebooks, and so of their folders, the chapters.

    A package's own `__init__` stands behind the modules of its chapter.
    """
    rank = {exported_as(path): i for i, path in enumerate(EXPORTING)}
    last = {name.rpartition(".")[0]: i for name, i in rank.items()}
    return rank | {package: i + 0.5 for package, i in last.items() if package}


def test_modules_import_only_what_stands_before_them():
    "Also where they are run as `python -m`."
    rank = ranks()
    wrong = defaultdict(list)
    for name, path in {**MODULES, **PACKAGES}.items():
        for other in sorted(own_imports(path)):
            if rank.get(other, len(rank)) >= rank.get(name, -1): wrong[name].append(other)
    said = [f"{name} imports {', '.join(others)}, not before it in nbs/" for name, others in wrong.items()]
    assert not said, "\n".join(said)


def test_packages_hold_only_their_docstring():
    for name, path in PACKAGES.items():
        tree = syntax(path)
        held = tree.body[ast.get_docstring(tree) is not None:]
        if name == "": assert [ast.unparse(n.targets[0]) for n in held] == ["__version__"], inside(path)
        elif name == HANDS_ON:
            names = [n for n in held if not isinstance(n, ast.ImportFrom)]
            other = [n for n in names if not ast.unparse(n).startswith("__all__ = ")]
            assert not other, f"{inside(path)} line {other[0].lineno}: it hands on names, and defines nothing"
        else: assert not held, f"{inside(path)} line {held[0].lineno}: put this into a module"


def test_library_needs_no_notebook_tools_and_loads_no_pickle():
    for path in CODE:
        strange = outside_imports(path) & {"fastcore", "nbdev", "IPython", "execnb"}
        assert not strange, f"{inside(path)} imports {strange}"
        pickled = re.search(r"torch\.load|pickle\.load|allow_pickle=True", path.read_text(encoding="utf-8"))
        assert not pickled, f"{inside(path)} loads a pickle"


def test_markup_stands_in_templates():
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        tags = re.findall(r"</?(?:p|h\d|a|div|span|section|table|t[dhr]|img|pre)[\s>]", text)
        assert not tags, f"{inside(path)} holds {tags[0]!r}: put it into a file of reports/templates"
