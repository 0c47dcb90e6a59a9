"""Write `nbs/names.ipynb`: every public name, and a link to the cell of the notebook that defines it.

`#cell-id=...` is how JupyterLab 4 and nbconvert's HTML name a cell; GitHub opens the notebook at its top.
"""
import ast
import json
from collections import defaultdict
from itertools import groupby

from sources import EXPORTING, MODULES, ROOT, cells, exported_as, source, syntax

PAGE = ROOT / "nbs" / "names.ipynb"
OPENING = """# names

> Every public name of the library, and where it is defined.

A link leads to the cell that defines the name, in its notebook; what stands around that cell says why, and
shows it at work. This page is written by `make prepare`.
"""
TABLE = "| name | defined in |\n|---|---|\n"


def public_names(module):
    "What a module offers: its `__all__`, in order."
    assigned = [node for node in syntax(MODULES[module]).body if isinstance(node, ast.Assign)]
    lists = [ast.literal_eval(n.value) for n in assigned if ast.unparse(n.targets[0]) == "__all__"]
    return lists[0] if lists else []


def defined_by(code):
    "Names that a cell defines at its top level: functions, classes and whatever is assigned."
    for node in ast.parse(code).body:
        if hasattr(node, "name"): yield node.name
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            yield from (n.id for n in ast.walk(target or ast.Pass()) if isinstance(n, ast.Name))


def definitions():
    "Name -> module -> link to the cell that defines it first, from the folder of notebooks."
    found = defaultdict(dict)
    for path in EXPORTING:
        module = exported_as(path)
        public = {*public_names(module)}
        place = path.relative_to(PAGE.parent).as_posix()
        for cell in cells(path, "code"):
            if not source(cell).startswith("#| export"): continue
            for name in public.intersection(defined_by(source(cell))):
                found[name].setdefault(module, f"{place}#cell-id={cell['id']}")
    return found


def initial(name): return name[0].upper()


def in_order(name): return initial(name), name.lower(), name


def row(name, places):
    links = " · ".join(f"[{module}]({link})" for module, link in sorted(places.items()))
    return f"| `{name}` | {links} |\n"


def markdown(name, text):
    "A cell; its id is made of a name, so that the same page has the same bytes."
    return {"cell_type": "markdown", "id": f"names-{name.lower()}", "metadata": {},
            "source": text.strip().splitlines(keepends=True)}


def render():
    "The page's text as it is stored, a heading per letter."
    found = definitions()
    letters = {letter: [*names] for letter, names in groupby(sorted(found, key=in_order), initial)}
    contents = " · ".join(f"[{letter}](#{letter})" for letter in letters)
    page = [markdown("opening", OPENING), markdown("contents", contents)]
    for letter, names in letters.items():
        rows = "".join(row(name, found[name]) for name in names)
        page.append(markdown(letter, f"## {letter}\n\n{TABLE}{rows}"))
    notebook = json.loads(EXPORTING[0].read_text(encoding="utf-8")) | {"cells": page}
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__": PAGE.write_text(render(), encoding="utf-8")
