"""Every notebook reads well from top to bottom, and what the exploratory ones store was drawn."""
import ast
import csv
import functools
import re
from textwrap import dedent

import pytest
from conftest import SHARED
from render_names import PAGE as NAMES
from sources import (
    EXPORTING,
    NOTEBOOKS,
    ROOT,
    UPLOADED,
    cells,
    exported_as,
    inside,
    known_to_git,
    natural,
    source,
)

INDEX = ROOT / "nbs" / "index.ipynb"
EXPLORE = [p for p in NOTEBOOKS if p.parent == ROOT / "nbs" / "explore"]
CHAPTERS = sorted({p.parent for p in EXPORTING}, key=natural)
OPENINGS = [p for p in NOTEBOOKS if p.name == "00_chapter.ipynb" and p.parent in CHAPTERS]
DEFINITIONS = ast.FunctionDef, ast.ClassDef
MOST_LINES = 25  # of code in a cell; empty lines and nbdev's directives are not counted
MOST_BYTES = 150_000  # of a stored picture

# why a cell stays in one piece -> module -> its longest definition, or its first line if it has none
LONGER = {
    "one class or function; no cell boundary can part it": {
        "data.progress": ["Lines"],
        "features.augment": ["GreenJitter"],
        "features.backbone": ["Backbone", "build_backbone"],
        "features.runner": ["TileRunner"],
        "features.store": ["FeatureCache", "SharedCache"],
        "features.pairs": ["PairStore"],
        "model.model": ["Reader", "Trunk", "BiomassModel"],
        "model.loss": ["total_loss"],
        "model.closed": ["ClosedForm", "KernelRidge", "GaussianProcess"],
        "inference.bundle": ["Bundle"],
        "inference.issues": ["Outcome"],
        "inference.passes": ["Compiling", "Passes"],
        "inference.partial": ["_File", "Partial"],
        "inference.folder": ["FolderTable"],
        "inference.ensemble": ["Members", "Ensemble", "_Run"],
        "inference.devices": ["_Worker", "_Attempt"],
        "inference.predict": ["predict_photos", "predict_competition", "predict_folder"],
        "training.member": ["MemberTrainer"],
        "training.batches": ["Batches", "StoredBatches", "PixelBatches"],
        "training.loop": ["Loop"],
        "training.deadline": ["Watch"],
        "training.scores": ["write_results"],
        "training.run": ["Run", "train_runs"],
        "training.own": ["Equations", "Adapter"],
        "training.adapt": ["write_adapted", "adapt"],
        "training.join": ["join_runs"],
        "evidence.compare": ["adversarial_validation"],
        "evidence.holdout": ["Trainer"],
        "evidence.search": ["conclude"],
        "reports.figures": ["plot_predicted", "plot_learning"],
        "kaggle.packing": ["pack"],
        "kaggle.sandbox": ["Sandbox"],
        "kaggle.sessions": ["run_sessions"],
        "kaggle.verify": ["verify"],
        "demo": ["run_demo"],
    },
    "a list or a text that is read as one": {
        "training.recipes": ["RECIPES = {"],
        "training.config": ["READ_ONLY_WHEN = {  # field -> (is it read?, what would make it so)"],
        "kaggle.packing": ['UPLOAD = """# Upload to Kaggle'],
    },
    "an example whose steps need what came before them": {
        "data.table": ["damage"],
        "model.model": ["from itertools import product"],
        "inference.bundle": ["said_of"],
    },
}
NO_PICTURE = {  # module -> why its notebook has nothing to look at
    "data.options": "names",
    "data.progress": "lines of text; they are printed",
    "data.interrupts": "exit codes; they are asserted",
    "data.files": "files and their digests; they are asserted",
    "data.xlsx": "cells of a sheet; they are asserted or shown as a table",
    "data.exif": "tags and what is read of them; they are asserted",
    "data.table": "rows and refusals; they are printed",
    "data.paths": "files and refusals; they are asserted or printed",
    "data.cells": "cells and refusals; they are printed or asserted",
    "data.wide": "a table and refusals; they are shown or printed",
    "features.options": "names",
    "features.device": "devices that this machine may lack; what is said of them is printed",
    "features.backbone": "shapes, digests and refusals; the effect of LoRA factors is asserted",
    "features.store": "arrays and files; they are asserted",
    "features.runner": "tensors that are alike; they are asserted",
    "features.pairs": "files; what they hold and what is said of them is asserted or printed",
    "model.options": "names",
    "model.layers": "tensors; their shapes and gradients are asserted",
    "inference.members": "what is refused; it is printed",
    "inference.card": "a page of text; it is printed",
    "inference.bundle": "files and digests; the folder is listed",
    "inference.pooled": "tensors and what is refused; both are asserted or printed",
    "inference.partial": "lines of a file, and what is recalled of them; they are printed or asserted",
    "inference.paddocks": "names and sums; they are asserted; the notebook of reports.paddocks shows means",
    "inference.issues": "a file of reasons and closing lines; both are printed",
    "inference.passes": "features and decisions; they are asserted",
    "inference.folder": "a table; it is shown, and its bytes are asserted",
    "inference.ensemble": "a plan and its cost; they are printed or asserted",
    "inference.devices": "threads and what they tell; it is asserted or printed",
    "inference.maps": "numbers per tile; the notebook of reports.photos lays them over photos",
    "training.config": "options and what contradicts what; the refusals are printed",
    "training.batches": "tensors; augmented copies are shown in the notebook of augment",
    "training.scores": "tables and JSON; the notebook of reports.run shows them",
    "training.forecast": "what a run would cost; it is printed",
    "training.describe": "words; they are asserted",
    "inference.pickles": "refusals; they are printed",
    "training.passes": "counts; they are asserted",
    "training.finish": "files; the notebook of training.run looks at them",
    "training.folder": "files and locks; they are asserted",
    "training.parts": "gradients that are alike; they are asserted",
    "training.deadline": "what is said of a clock and of missing members; it is printed",
    "training.setup": "what is refused and what is prepared; both are asserted",
    "training.join": "scores and refusals; they are printed",
    "training.recipes": "a table of recipes",
    "training.own": "matrices and a rule; they are asserted, and the notebook of adapt has the picture",
    "evidence.probe": "one score beside two others; they are printed",
    "evidence.compare": "differences with their intervals; they are printed",
    "evidence.stacking": "weights; they are asserted",
    "reports.html": "the words and tables of a page; the notebook of reports.run shows one whole",
    "evidence.space": "values and command lines; they are printed",
    "reports.training": "lines and scores; they are printed",
    "reports.run": "the text of a page; its figures are in the notebook of reports.figures",
    "kaggle.training": "what a session says and leaves; it is printed",
    "kaggle.metadata": "refusals; they are printed",
    "kaggle.wheel": "a list of files; it is printed",
    "kaggle.packing": "files and metadata; they are printed",
    "kaggle.environment": "versions and pip's answers; they are printed or asserted",
    "kaggle.sandbox": "processes and limits; they are asserted",
    "kaggle.sessions": "files and digests; they are asserted",
    "kaggle.verify": "a verdict; its lines are printed",
    **dict.fromkeys(("command", "train", "search", "predict", "report", "validate", "pack", "demo", "adapt"),
                    "answers, which are asserted; the notebooks of reports show the pictures"),
}


def title_of(path): return exported_as(path) or inside(path.with_suffix("")).removeprefix("nbs/")


def headings(path):
    "(level, text) of every heading, in order; a comment in a block of code is none."
    prose = "\n".join("".join(source(c).split("```")[::2]) for c in cells(path, "markdown"))
    lines = [line for line in prose.splitlines() if line.startswith("#")]
    return [(len(line) - len(line.lstrip("#")), line.lstrip("#").strip()) for line in lines]


def stored(path): return [o for c in cells(path, "code") for o in c["outputs"]]


def length(code):
    "Lines of code, without imports, which stand one name a line."
    imports = [n for n in ast.parse(code).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    imported = {line for n in imports for line in range(n.lineno, n.end_lineno + 1)}
    counted = [line for i, line in enumerate(code.splitlines(), 1) if i not in imported]
    return sum(bool(line.strip()) and not line.startswith("#|") for line in counted)


def named(code):
    "The longest definition of a cell, or its first line."
    body = ast.parse(code).body
    defined = {n.end_lineno - n.lineno: n.name for n in reversed(body) if isinstance(n, DEFINITIONS)}
    return defined[max(defined)] if defined else ast.get_source_segment(code, body[0]).splitlines()[0]


def long_cells(path):
    return [named(code) for code in map(source, cells(path, "code")) if length(code) > MOST_LINES]


def excused(path): return [name for group in LONGER.values() for name in group.get(title_of(path), [])]


def test_every_notebook_that_git_knows_is_held_to_this():
    "Each is of a kind that the tests below know; and the tables above name no notebook that is gone."
    of_a_kind = {*EXPORTING, *EXPLORE, *OPENINGS, INDEX, NAMES}
    stray = sorted(map(inside, {*NOTEBOOKS} - of_a_kind))
    assert not stray, f"{stray}: none exports a module, explores, opens a chapter, is index or names"
    gone = {*NO_PICTURE, *(name for group in LONGER.values() for name in group)} - {*map(title_of, NOTEBOOKS)}
    assert not gone, f"LONGER or NO_PICTURE name {sorted(gone)}, which no notebook exports"
    try:
        missed = sorted(map(inside, known_to_git("nbs", ".ipynb") - of_a_kind))
    except LookupError as reason:
        pytest.skip(f"not compared with git: {reason}")
    assert not missed, f"walk() in tests/sources.py does not see {missed}"


every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=title_of)
also_uploaded = pytest.mark.parametrize("path", [*NOTEBOOKS, *UPLOADED], ids=title_of)


@every_notebook
def test_opens_with_its_title_and_a_sentence(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    title, empty, sentence = source(first).splitlines()[:3]
    assert title.startswith("# ") and not empty and sentence.startswith("> ") and len(sentence.split()) >= 5
    paragraph = source(first).split("\n\n")[1]
    assert paragraph.rstrip().endswith("."), "the sentence has no end"


@also_uploaded
def test_headings_are_in_order(path):
    levels, texts = zip(*headings(path))
    assert levels[0] == 1 and levels.count(1) == 1, "one title"
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:])), "a level is skipped"
    assert len(set(texts)) == len(texts), "two headings share a name, so a link to one is a link to the other"


@also_uploaded
def test_cells_have_ids_of_their_own(path):
    ids = [c["id"] for c in cells(path)]
    assert len(set(ids)) == len(ids), "a merge by id would drop one of them"


@pytest.mark.parametrize("path", [*EXPORTING, *EXPLORE], ids=title_of)
def test_lists_its_contents(path):
    sections = [text for level, text in headings(path) if level == 2]
    links = [f"[{text}](#{text.replace(' ', '-')})" for text in sections]
    opening = " ".join(" ".join(source(c) for c in cells(path)[:2] if c["cell_type"] == "markdown").split())
    if "](#" in opening or len(sections) >= 4:
        assert " · ".join(links) in opening, f"contents should read {' · '.join(links)}"


PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


def prose(path):
    "A page's text, or that of a notebook's markdown cells, without blocks of code and words set as code."
    whole = path.suffix == ".md"
    text = path.read_text(encoding="utf-8") if whole else "\n\n".join(map(source, cells(path, "markdown")))
    return re.sub(r"`[^`\n]*`", "", "".join(text.split("```")[::2]))


@functools.cache
def anchors(path):
    "What a link into a page or a notebook may name behind its `#`: a heading, or a cell of a notebook."
    if path.suffix == ".ipynb":
        titles = {text.replace(" ", "-") for _, text in headings(path)}
        return titles | {f"cell-id={c['id']}" for c in cells(path)}
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in titles}


def leads_somewhere(path, link):
    "Whether a link of this file names a file that is here, and a heading or cell of it."
    name, _, anchor = link.partition("#")
    target = path.parent / name if name else path
    return target.exists() and (not anchor or anchor in anchors(target))


@pytest.mark.parametrize("path", [*NOTEBOOKS, *UPLOADED, *PAGES], ids=inside)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    dead = [link for link in links if ":" not in link.split("#")[0] and not leads_somewhere(path, link)]
    assert not dead, f"{inside(path)}: nothing is at {dead}"


def test_the_readme_has_a_row_for_every_notebook():
    rows = "\n".join(re.findall(r"^\|.*", prose(INDEX), re.M))
    mapped = [(INDEX.parent / link).resolve() for link in re.findall(r"\]\(([^)]+\.ipynb)\)(?= \|)", rows)]
    missing = sorted(map(inside, {*EXPORTING, *OPENINGS, *EXPLORE} - {*mapped}))
    assert not missing, f"nbs/index.ipynb has no row for {missing}"
    in_order = sorted({*EXPORTING, *OPENINGS}, key=natural)
    assert [path for path in mapped if path not in EXPLORE] == in_order, "not in the order of the notebooks"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=inside)
def test_a_chapter_opens_with_its_page(chapter):
    "What comes in and goes out, a link to each of its notebooks, and one picture with an `assert` behind it."
    page = chapter / "00_chapter.ipynb"
    assert page.exists(), f"{inside(chapter)}: write a page that says what comes in and what goes out"
    own = [p for p in NOTEBOOKS if p.parent == chapter]
    assert own[0] == page, f"{inside(page)} does not stand first"
    text = prose(page)
    assert "\n| in" in text and "\n| out" in text
    linked = {(chapter / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)\)", text)}
    assert not {*own[1:]} - linked, f"not linked: {sorted(map(inside, {*own[1:]} - linked))}"
    pictures = [kind for o in stored(page) for kind in o.get("data", {}) if kind.startswith("image/")]
    assert len(pictures) == 1 and any("\nassert " in source(c) for c in cells(page, "code"))


@pytest.mark.parametrize("page", OPENINGS, ids=inside)
def test_a_chapters_page_uses_its_own_chapter_and_those_before(page):
    "And what draws it, which stands in the chapter of reports."
    before = CHAPTERS[:CHAPTERS.index(page.parent) + 1]
    may = {exported_as(p) for p in EXPORTING if p.parent in before} | {"reports.flow", "reports.html"}
    code = ast.parse("\n".join(map(source, cells(page, "code"))))
    used = {n.module.removeprefix("biomass_kit.") for n in ast.walk(code)
            if isinstance(n, ast.ImportFrom) and n.module.startswith("biomass_kit.")}
    assert used and used <= may, f"{sorted(used - may)} stand in later chapters"


@also_uploaded
def test_cells_are_short(path):
    surplus = sorted(set(long_cells(path)) - set(excused(path)))
    assert not surplus, (
        f"over {MOST_LINES} lines: the cells of {surplus}; part them, or say in LONGER why not")
    gone = sorted(set(excused(path)) - set(long_cells(path)))
    assert not gone, f"short enough by now: the cells of {gone}; drop them from LONGER"


def shows(path):
    "Whether a notebook has a picture: among its outputs, or linked by its prose."
    drawn = any(kind.startswith("image/") for o in stored(path) for kind in o.get("data", {}))
    return drawn or any("![" in source(c) for c in cells(path, "markdown"))


@pytest.mark.parametrize("path", [*EXPORTING, *OPENINGS, *EXPLORE], ids=title_of)
def test_has_something_to_look_at(path):
    excuse = title_of(path) in NO_PICTURE
    assert shows(path) != excuse, "draw something, or say in NO_PICTURE why there is nothing to see; not both"
    shown = [item for o in stored(path) for item in o.get("data", {}).items()]
    sizes = [len("".join(v)) * 3 // 4 for kind, v in shown if kind in ("image/png", "image/jpeg")]
    assert max(sizes, default=0) <= MOST_BYTES


def shown(node):
    "Whether a last statement is a value, which a notebook prints."
    values = (ast.Name, ast.Dict, ast.List, ast.Subscript, ast.Attribute)
    return isinstance(node, ast.Expr) and isinstance(node.value, values)


@every_notebook
def test_outputs_are_stored_and_clean(path):
    for c in (c for c in cells(path, "code") if "#| eval: false" not in source(c)):
        noise = [o for o in c["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"]
        assert not noise, f"{source(c)[:60]}: {noise}"
        body = ast.parse(dedent(source(c))).body
        draws = "plt.subplots(" in source(c) and "plt.close(" not in source(c)
        calls = [n.value for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
        prints = any(getattr(call.func, "id", "") == "print" for call in calls)
        if draws:
            pictures = any("image/png" in o.get("data", {}) for o in c["outputs"])
            assert pictures, f"run it: {source(c)[:60]}"
        if prints or body and shown(body[-1]): assert c["outputs"], f"run it: {source(c)[:60]}"
        values = [o for o in c["outputs"] if o["output_type"] == "execute_result"]
        stale = values and not isinstance(body[-1], ast.Expr)
        assert not stale, f"run it, its last line has no value and one is stored: {source(c)[:60]}"


@pytest.mark.parametrize("path", UPLOADED, ids=title_of)
def test_uploaded_as_it_was_written(path):
    "Without the outputs that Jupyter stores, and without logic, which is the library's."
    ran = [c["id"] for c in cells(path, "code") if c["outputs"] or c["execution_count"]]
    assert not ran, f"clear the outputs of {ran}"
    codes = [ast.parse(source(c)) for c in cells(path, "code")]
    assert not [n for code in codes for n in ast.walk(code) if isinstance(n, DEFINITIONS)]


@pytest.mark.parametrize("path", EXPLORE, ids=title_of)
def test_explore_runs_on_what_is_committed(path):
    settings = ast.parse(source(cells(path, "code")[0])).body
    assert settings and all(isinstance(n, ast.Assign) for n in settings), (
        "the first cell holds the variables, and nothing else")
    for n in settings:
        value = ast.literal_eval(n.value)
        assert value is None or (path.parent / value).resolve().is_relative_to(ROOT / "tests"), (
            f"{n.targets[0].id} = {value!r} is not what the notebook is committed with")


@pytest.mark.parametrize("path", EXPLORE, ids=title_of)
def test_explore_defines_nothing(path):
    for code in map(source, cells(path, "code")):
        defined = [n.name for n in ast.walk(ast.parse(code)) if isinstance(n, DEFINITIONS)]
        assert not defined, f"{defined}: what is worth a function belongs into a module"
        assert not code.startswith("#| export")


@pytest.mark.skipif(not (SHARED / "csiro").is_dir(), reason="the competition's photos are not here")
def test_no_output_names_a_real_photo():
    with open(SHARED / "csiro" / "train.csv", encoding="utf-8") as f:
        real = {row["image_path"].split("/")[-1].removesuffix(".jpg") for row in csv.DictReader(f)}
    assert len(real) == 80
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert not [photo for photo in real if photo in text], inside(path)
