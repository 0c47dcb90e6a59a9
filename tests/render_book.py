"""Write all notebooks as static HTML, linked among each other: `python tests/render_book.py [FOLDER]`."""
import re
import shutil
import sys
from pathlib import Path

from nbconvert import HTMLExporter
from sources import NOTEBOOKS, ROOT

NBS = ROOT / "nbs"
# of a link to another notebook; addresses of the web have a colon
TO_NOTEBOOK = re.compile(r'(href="[^":]+)\.ipynb((?:#[^"]*)?")')


def html(path) -> str:
    "A notebook's page; links to notebooks lead to their pages."
    page, _ = HTMLExporter().from_filename(str(path))
    return TO_NOTEBOOK.sub(r"\1.html\2", page)


def write_book(folder, notebooks=NOTEBOOKS):
    "The pages of some notebooks, in their folders, and the pictures that they link."
    folder = Path(folder)
    shutil.copytree(NBS / "images", folder / "images", dirs_exist_ok=True)
    for path in notebooks:
        page = (folder / path.relative_to(NBS)).with_suffix(".html")
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(html(path), encoding="utf-8")


if __name__ == "__main__": write_book(*(sys.argv[1:] or ["_book"]))
