"""What the project is made of: its modules, notebooks and tests, at any depth; and who imports whom."""
import ast
import configparser
import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "biomass_kit"


def inside(path):
    "A path as it reads from the project's top."
    return path.relative_to(ROOT).as_posix()


def natural(path):
    "Sorts paths as their numbers count: `2_features` before `10_bundle` before `10b_plan`."
    numbered = [re.split(r"(\d+)", part) for part in inside(path).split("/")]
    return [[int(piece) if piece.isdigit() else piece for piece in part] for part in numbered]


def walk(folder, suffix):
    "Every file of this kind in a folder of the project, at any depth, without what tools leave beside them."
    found = (ROOT / folder).rglob(f"*{suffix}")
    return sorted((p for p in found if not {"__pycache__", ".ipynb_checkpoints"} & {*p.parts}), key=natural)


def known_to_git(folder, suffix):
    "The same files as git has them: tracked, or new and not ignored; `LookupError` without a checkout."
    if not (ROOT / ".git").exists(): raise LookupError(f"{ROOT} is no git checkout")
    if not shutil.which("git"): raise LookupError("git is not installed")
    new_too = ["--cached", "--others", "--exclude-standard"]
    command = ["git", "ls-files", "-z", *new_too, "--", f"{folder}/*{suffix}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode: raise LookupError(f"git ls-files: {done.stderr.strip()}")
    listed = {ROOT / name for name in done.stdout.split("\0") if name}
    return {path for path in listed if path.is_file()}  # not what was moved away since


def cells(path, kind=None):
    "A notebook's cells, of one kind if asked."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [c for c in notebook["cells"] if kind in (None, c["cell_type"])]


def source(cell): return "".join(cell["source"])


@functools.cache
def exported_as(path):
    "The module that a notebook exports, `data.targets`; None where it exports none."
    found = [re.match(r"#\|\s*default_exp\s+(\S+)", source(c)) for c in cells(path, "code")]
    return next((match[1] for match in found if match), None)


def module_name(path):
    "A library file's name, as `data.targets`; of an `__init__`, its package's name, empty at the top."
    parts = path.relative_to(ROOT / LIBRARY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def commands():
    "What settings.ini installs as commands: `biomass_train` -> `biomass_kit.train:main`."
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(line.split("=") for line in ini["DEFAULT"]["console_scripts"].split())


CODE = [p for p in walk(LIBRARY, ".py") if p.name != "_modidx.py"]  # nbdev's index holds no code
MODULES = {module_name(p): p for p in CODE if p.stem != "__init__"}
PACKAGES = {module_name(p): p for p in CODE if p.stem == "__init__"}
TEMPLATES = [p for suffix in (".html", ".css") for p in walk(f"{LIBRARY}/reports/templates", suffix)]
UPLOADED = walk(f"{LIBRARY}/kaggle/notebooks", ".ipynb")  # to Kaggle
TESTS = walk("tests", ".py")
NOTEBOOKS = walk("nbs", ".ipynb")
EXPORTING = [p for p in NOTEBOOKS if exported_as(p)]


@functools.cache
def syntax(path): return ast.parse(path.read_text(encoding="utf-8"))


def when_loaded(tree):
    "The imports at a module's top; what a function imports when it is called is its own affair."
    return ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom, ast.Try))], [])


def imported(path, part=None):
    """Names of the modules that a library file imports, in all of it or a part.

    The library's own are absolute, though nbdev writes them as relative. A name taken from a package is
    the module of that name where there is one: `from biomass_kit.data import targets`.
    """
    package = module_name(path if path.stem == "__init__" else path.parent / "__init__.py")
    here = [LIBRARY, *filter(None, package.split("."))]
    for node in ast.walk(part or syntax(path)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = here[:len(here) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                yield whole if below(whole) in {*MODULES, *PACKAGES} else origin


def below(name):
    "What follows `biomass_kit.`; empty for the top package, None for modules of others."
    if name == LIBRARY: return ""
    return name.removeprefix(f"{LIBRARY}.") if name.startswith(f"{LIBRARY}.") else None


def own_imports(path, part=None):
    "The library's modules and packages that a file imports, named as in `MODULES`; the top one is left out."
    return {below(name) for name in imported(path, part)} - {None, ""}


def outside_imports(path, part=None):
    "What a file imports of others, by its first name: `torch`."
    return {name.split(".")[0] for name in imported(path, part) if below(name) is None}
