"""What every source is held to: ruff's rules (`ruff.toml`), and the sizes of modules, classes and functions.

Sizes are counted in lines that are neither blank nor a comment alone: of a module and a class all of them, of
a function its body without the docstring.
"""
import ast
import io
import subprocess
import sys
import tokenize

from sources import CODE, NOTEBOOKS, ROOT, TESTS, UPLOADED, inside, syntax

MOST = {"module": 400, "class": 100, "function": 25}  # lines
NOT_CODE = {getattr(tokenize, name) for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")}
KINDS = {ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}


def checked(*options):
    "`ruff check` of the whole project."
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", *options, "."]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


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


def sizes(path):  # yields (name, lines)
    "Lines of a file's module, classes and functions, as counted here."
    lines = code_lines(path)
    yield "module", len(lines)
    for name, node in definitions(syntax(path)):
        first = node.lineno if isinstance(node, ast.ClassDef) else body_of(node)[0].lineno
        yield name, len(lines & {*range(first, node.end_lineno + 1)})


def test_no_line_breaks_a_rule():
    done = checked("--output-format", "concise")
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def test_nothing_is_too_large():
    said = [f"{inside(path)}: {name} has {size} lines, at most {MOST[name.split()[0]]}: part it"
            for path in [*CODE, *TESTS] for name, size in sizes(path) if size > MOST[name.split()[0]]]
    assert not said, "\n".join(said)


def test_ruff_reads_library_notebooks_and_tests():
    read = {*checked("--show-files").stdout.split("\n")}
    missed = [inside(path) for path in [*CODE, *TESTS, *NOTEBOOKS, *UPLOADED] if str(path) not in read]
    assert not missed, f"ruff.toml leaves out {missed}"
