"""From the index a reader finds every public name in two clicks: the page of names, then its cell."""
import re

import pytest
import render_names
from render_names import PAGE, defined_by, public_names
from sources import EXPORTING, MODULES, ROOT, cells, exported_as, source

NOTEBOOK_OF = {exported_as(path): path for path in EXPORTING}


def links():
    "(name, module) -> its link on the page."
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", "\n".join(map(source, cells(PAGE))), re.M)
    return {(name, module): link for name, places in rows
            for module, link in re.findall(r"\[([\w.]+)\]\((\S+)\)", places)}


LINKS = links()


def test_index_and_readme_link_the_page():
    assert "](names.ipynb)" in "".join(map(source, cells(ROOT / "nbs" / "index.ipynb", "markdown")))
    assert "](nbs/names.ipynb)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_is_current():
    assert render_names.render() == PAGE.read_text(encoding="utf-8"), "run make prepare"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_public_name_leads_to_its_definition(module):
    by_id = {cell["id"]: source(cell) for cell in cells(NOTEBOOK_OF[module], "code")}
    assert public_names(module), "no public name, or nbdev writes __all__ otherwise now"
    for name in public_names(module):
        path, _, cell = LINKS[name, module].partition("#cell-id=")
        assert PAGE.parent / path == NOTEBOOK_OF[module]
        assert by_id[cell].startswith("#| export") and name in defined_by(by_id[cell]), name


def test_no_other_name_is_on_the_page():
    assert {*LINKS} == {(name, module) for module in MODULES for name in public_names(module)}
