"""The wheel that is uploaded to Kaggle: it holds the whole library, and works where no checkout is."""
import json
import os
import shutil
import tarfile
import zipfile

import pytest
from conftest import python
from sources import CODE, LIBRARY, ROOT, TEMPLATES, UPLOADED, inside, known_to_git

from biomass_kit.kaggle.metadata import KERNEL
from biomass_kit.kaggle.wheel import build_wheel

TRACKED = ROOT / "kaggle_datasets"
DATA = [*TEMPLATES, *UPLOADED]
IMPORTS = (  # what notebooks import from biomass_kit.kaggle that were uploaded with earlier releases
    "check_reference, find_inputs, predict_competition, print_progress",
    "check_reference, find_inputs, predict_inputs, print_progress, show_predictions",
    "check_reference, find_inputs, predict_inputs, print_progress, show_predictions, summary_lines",
)
AT_HOME = """
import sys
homes = {m.__file__ for name, m in sys.modules.items() if name.partition(".")[0] == "biomass_kit"}
strange = {home for home in homes if not home.startswith(sys.argv[1])}
assert homes and not strange, f"{strange} are not the wheel's"
"""
WRITE = """
import sys
from biomass_kit.kaggle.packing import write_tracked
write_tracked(*sys.argv[2:])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory): return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    "A folder that holds the library as the wheel brings it, and nothing else."
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as packed: packed.extractall(folder)
    return folder


def from_wheel(folder, code, *words):
    "Run Python where the library is the unpacked wheel's, away from the checkout."
    elsewhere = {**os.environ, "PYTHONPATH": str(folder)}
    done = python("-P", "-c", code + AT_HOME, folder, *words, cwd=folder, env=elsewhere)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_every_module_template_and_notebook(wheel):
    "Also those that git knows and no list of the tests."
    with zipfile.ZipFile(wheel) as packed:
        held = {name: packed.read(name) for name in packed.namelist() if name.startswith(f"{LIBRARY}/")}
    due = {inside(path): path.read_bytes() for path in [*CODE, *DATA, ROOT / LIBRARY / "_modidx.py"]}
    assert sorted(held) == sorted(due), "setup.py packs folders with an __init__.py, and package_data"
    assert held == due
    try:
        suffixes = ".py", ".html", ".css", ".ipynb"
        known = {path for suffix in suffixes for path in known_to_git(LIBRARY, suffix)}
    except LookupError as reason:
        pytest.skip(f"not compared with git: {reason}")
    assert {*map(inside, known)} <= {*held}


def test_a_source_distribution_holds_what_a_wheel_is_built_of(tmp_path):
    for name in ("setup.py", "settings.ini", "README.md", "MANIFEST.in"): shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / LIBRARY, tmp_path / LIBRARY, ignore=shutil.ignore_patterns("__pycache__"))
    done = python("setup.py", "--quiet", "sdist", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("dist/*.tar.gz"))) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    assert {"setup.py", "settings.ini", "README.md", *map(inside, [*CODE, *DATA])} <= held


def test_it_writes_what_is_tracked(unpacked, tmp_path):
    metadata = TRACKED / KERNEL / "kernel-metadata.json"
    user = json.loads(metadata.read_text(encoding="utf-8"))["id"].split("/")[0]
    from_wheel(unpacked, WRITE, tmp_path, user)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(made) == 7
    assert made == {path: (TRACKED / path).read_bytes() for path in made}
    for path in UPLOADED: assert path.read_bytes() in made.values(), inside(path)


def test_earlier_notebooks_find_what_they_import(unpacked):
    from_wheel(unpacked, "".join(f"from biomass_kit.kaggle import {names}\n" for names in IMPORTS))


PAGES = """
from biomass_kit.reports.html import TEMPLATES
for name in TEMPLATES.list_templates(): print(name, len(TEMPLATES.loader.get_source(TEMPLATES, name)[0]))
"""


def test_its_reports_find_their_templates(unpacked):
    sizes = {path.name: len(path.read_text(encoding="utf-8")) for path in TEMPLATES}
    assert {"page.html", "page.css", "run.html", "folder.html"} <= {*sizes}
    assert from_wheel(unpacked, PAGES).split("\n")[:-1] == [f"{n} {sizes[n]}" for n in sorted(sizes)]
