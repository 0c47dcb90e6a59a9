"""What the rules forbid and the sources still hold, by file and count in `ratchet.json`: it may only shrink.

Lines are ruff's business (`ruff.toml`). Sizes are counted here, in lines that are neither blank nor a comment
alone: of a module and a class all of them, of a function its body without the docstring.

`python tests/test_ratchet.py --write` takes off the list what was mended. What one file lost another may have
gained, since files are moved and split; but no rule's total may rise.
"""
import ast
import functools
import io
import json
import shutil
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict

from sources import CODE, NOTEBOOKS, ROOT, TESTS, UPLOADED, inside, source, syntax

LIST = ROOT / "tests" / "ratchet.json"
MOST = {"module": 400, "class": 100, "function": 25}  # lines
WRITE = "python tests/test_ratchet.py --write"
SHOWN = 10  # lines named of one file and rule
NOT_CODE = {getattr(tokenize, name) for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")}
KINDS = {ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}


def checked(*options):
    "What `ruff check` prints about the whole project."
    command = [sys.executable, "-m", "ruff", "check", *options, "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"ruff did not run; pip install -e '.[dev]'. It said: {done.stderr.strip()}"
    return done.stdout


@functools.cache
def ruff():
    "What ruff finds in the project: file -> rule -> its findings."
    found = defaultdict(lambda: defaultdict(list))
    for finding in json.loads(checked("--no-cache", "--exit-zero", "--output-format", "json")):
        name = inside(ROOT / finding["filename"])
        found[name][finding["code"] or "syntax"].append(finding)
    return found


def code_lines(path):
    "Numbers of the lines that are neither blank nor a comment alone."
    text = path.read_text(encoding="utf-8")
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in NOT_CODE]
    held = {i for t in tokens for i in range(t.start[0], t.end[0] + 1)}
    return {i for i, line in enumerate(text.split("\n"), 1) if i in held and line.strip()}


def definitions(node, prefix=""):
    "Every class and function of a tree under its full name, `class Bundle`, `function Bundle.read`."
    for child in ast.iter_child_nodes(node):
        kind = KINDS.get(type(child))
        if kind: yield f"{kind} {prefix}{child.name}", child
        yield from definitions(child, f"{prefix}{child.name}." if kind else prefix)


def body_of(function):
    "Its statements after the docstring; the docstring where there is nothing else."
    return function.body[ast.get_docstring(function) is not None:] or function.body


def sizes(path):
    "Lines of a file's module, classes and functions, as counted here."
    lines = code_lines(path)
    found = {"module": len(lines)}
    for name, node in definitions(syntax(path)):
        first = node.lineno if isinstance(node, ast.ClassDef) else body_of(node)[0].lineno
        size = len(lines & {*range(first, node.end_lineno + 1)})
        found[name] = max(size, found.get(name, 0))
    return found


def limit(name): return MOST[name.split()[0]]


@functools.cache
def present():
    "The offenders of today, in the form of the list."
    lines, large = {}, {}
    for file, rules in sorted(ruff().items()):
        lines[file] = {rule: len(found) for rule, found in sorted(rules.items())}
    for path in [*CODE, *TESTS]:
        found = {name: size for name, size in sizes(path).items() if size > limit(name)}
        if found: large[inside(path)] = found
    return {"lines": lines, "sizes": large}


def listed(): return json.loads(LIST.read_text(encoding="utf-8"))


def changes(part):
    "What differs from the list: (file, rule or name, listed, present)."
    now, before = present()[part], listed()[part]
    for file in sorted({*now, *before}):
        for name in sorted({*now.get(file, {}), *before.get(file, {})}):
            counts = before.get(file, {}).get(name, 0), now.get(file, {}).get(name, 0)
            if counts[0] != counts[1]: yield file, name, *counts


def source_lines(name, text):
    "(cell, line) -> text; the cell is None in Python files, and counted from 1 in notebooks."
    notebook = name.endswith(".ipynb")
    pieces = enumerate(map(source, json.loads(text)["cells"]), 1) if notebook else [(None, text)]
    return {(cell, i): line for cell, piece in pieces for i, line in enumerate(piece.splitlines(), 1)}


def committed_lines(name):
    "The texts of a file's lines as last committed; none where git does not know it."
    if not shutil.which("git"): return set()
    done = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, text=True)
    return {*source_lines(name, done.stdout).values()} if done.returncode == 0 else set()


def described(name, rule):
    "A file's findings of one rule, those in lines that were not committed before if there are such."
    lines = source_lines(name, (ROOT / name).read_text(encoding="utf-8"))
    before = committed_lines(name)
    found = [(f, lines.get((f["cell"], f["location"]["row"]), "")) for f in ruff()[name][rule]]
    found = [(f, line) for f, line in found if line not in before] or found
    for f, line in found[:SHOWN]:
        cell = f"cell {f['cell']} " if f["cell"] else ""
        yield f"  {name} {cell}line {f['location']['row']}: {rule} {f['message']}: {line.strip()[:60]}"
    if found[SHOWN:]: yield f"  and {len(found) - SHOWN} more in {name}"


def if_only_moved():
    "A hint for whoever renamed or split a file."
    return "" if risen(listed(), present()) else f" (no total rose; if code was only moved: {WRITE})"


def test_no_line_breaks_a_rule_anew():
    said = []
    for file, rule, before, now in changes("lines"):
        if now > before:
            said += [f"{file}: {now} x {rule}, where {LIST.name} lists {before}:", *described(file, rule)]
    assert not said, "\n".join([f"mend these, they are new{if_only_moved()}:", *said])


def test_nothing_grows_too_large():
    said = [f"  {file}: {name} has {now} lines, at most {max(before, limit(name))}: part it"
            for file, name, before, now in changes("sizes") if now > before]
    assert not said, "\n".join([f"part these, they grew{if_only_moved()}:", *said])


def test_the_list_is_as_short_as_can_be():
    mended = [f"  {file}: {name} {now}, listed {before}" for part in ("lines", "sizes")
              for file, name, before, now in changes(part) if now < before]
    assert not mended, "\n".join([f"better than listed; shrink the list: {WRITE}", *mended])


def test_ruff_reads_library_notebooks_and_tests():
    read = {*checked("--show-files").split("\n")}
    missed = [inside(path) for path in [*CODE, *TESTS, *NOTEBOOKS, *UPLOADED] if str(path) not in read]
    assert not missed, f"ruff.toml leaves out {missed}"


def totals(offenders):
    "By rule, how many findings; by kind of definition, how many lines of code over the limit."
    total = Counter()
    for rules in offenders["lines"].values(): total.update(rules)
    for found in offenders["sizes"].values():
        for name, size in found.items():
            total[f"{name.split()[0]} too large, lines over"] += size - limit(name)
    return total


def risen(before, now):
    "Totals that are higher now: name -> (before, now)."
    old, new = totals(before), totals(now)
    return {name: (old[name], count) for name, count in sorted(new.items()) if count > old[name]}


def test_the_list_takes_moves_but_no_total_that_rose():
    before = {"lines": {"a.py": {"E501": 2}, "b.py": {"F401": 1}}, "sizes": {"a.py": {"function f": 60}}}
    moved = {"lines": {"c.py": {"E501": 2}}, "sizes": {"c.py": {"function g": 30, "function h": 30}}}
    assert not risen(before, moved)
    assert risen(moved, before) == {"F401": (0, 1), "function too large, lines over": (10, 35)}


def write():
    "Bring the list up to date, unless a total rose."
    worse = risen(listed(), present())
    if worse:
        rose = "; ".join(f"{name} {old} -> {new}" for name, (old, new) in worse.items())
        sys.exit(f"not written, for this rose: {rose}. pytest tests/test_ratchet.py names the lines")
    LIST.write_text(json.dumps(present(), indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{name} {count}" for name, count in sorted(totals(present()).items())))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]: sys.exit(f"usage: {WRITE}")
    write()
