"""As static HTML, the index leads to every name's definition by links that are there."""
import re
from urllib.parse import unquote

import pytest
from render_book import write_book
from render_names import PAGE
from sources import EXPORTING, MODULES, ROOT

INDEX = ROOT / "nbs" / "index.ipynb"


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    "The index, the names and one notebook, as pages."
    folder = tmp_path_factory.mktemp("book")
    write_book(folder, [INDEX, PAGE, EXPORTING[1]])
    return folder


def links(page): return re.findall(r'href="([^":]+?)(#[^"]*)?"', page.read_text(encoding="utf-8"))


def test_links_between_pages(book):
    for page in (book / "index.html", book / "names.html"):
        pages = [(page.parent / name).relative_to(book) for name, _ in links(page) if name.endswith(".html")]
        assert len(pages) > len(MODULES)
        gone = [p for p in pages if not (ROOT / "nbs" / p).with_suffix(".ipynb").exists()]
        assert not gone, f"{page.name} leads to {gone}"


def test_a_name_leads_to_its_cell(book):
    own = EXPORTING[1].relative_to(ROOT / "nbs").with_suffix(".html").as_posix()
    there = {*re.findall(r'id="([^"]+)"', (book / own).read_text(encoding="utf-8"))}
    asked = [unquote(anchor[1:]) for name, anchor in links(book / "names.html") if name == own]
    assert len(asked) > 20 and not {*asked} - there


def test_no_link_is_left_to_a_notebook(book):
    for page in book.rglob("*.html"):
        assert not [name for name, _ in links(page) if name.endswith(".ipynb")], page.name


def test_pictures_travel(book):
    named = re.findall(r'src="(images/[^"]+)"', (book / "index.html").read_text(encoding="utf-8"))
    assert named and all((book / name).is_file() for name in named)
