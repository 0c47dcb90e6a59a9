"""One word for one thing, in README, help and prose: words that mislead a reader, and what to say instead."""
import json
import re

import pytest
from commands import command
from sources import NOTEBOOKS, ROOT, UPLOADED, commands, inside, source

INSTEAD = {  # what is not said -> what is
    r"\bfigures? (?:for|of) (?:a|each|every) photo|(?:its|their|five|ensemble's) figures?\b":
        "prediction, value, grams",
    r"\b(?:grams|seconds|ms|MB|bytes|passes|rows?|predictions?|copies|tiles) an? "
    r"(?:photo|fold|tile|member)\b":
        "per photo, per fold, per tile, per member",
    r"\brooms?\b|\bhouse\b": "module, notebook, environment, disk space",
    r"\bdeals?\b|\bdealt\b": "split, fold assignment, work queue",
    r"\bdrawn (?:test )?photos?\b|\bdrawn (?:variant|cop)": "synthetic photo, augmented copy",
    r"\bno numbers?\b(?! of)|numbers? that (?:is|are) none": "NaN or infinite value",
    r"\b[Ll]ikeness of (?:a|the) photo": "p-value against the training photos",
    r"cannot be told(?! from)": "inconclusive",
    r"\bflatter": "optimistically biased",
    r"identities' break": "penalty for violating GDM = green + clover and total = GDM + dead",
    r"backbone that learns": "fine-tuned backbone",
    r"\bunsigned\b|\bsigned (?:manifest|bundle)": "content digest",
    r"befall": "despite corrupt files, low memory, GPU failure or lack of time",
}
PAGES = ("README.md", "CONTRIBUTING.md", "kaggle_datasets/README.md")

def faults(text):
    "What is said, beside what should be."
    return [f"'{found[0]}': say {better}" for worse, better in INSTEAD.items()
            for found in re.finditer(worse, text)]


def test_words_are_found():
    assert faults("five drawn photos take 3 ms a photo, and so does a room") == [
        "'ms a photo': say per photo, per fold, per tile, per member",
        "'room': say module, notebook, environment, disk space",
        "'drawn photos': say synthetic photo, augmented copy"]
    assert not faults("3 ms per photo of a synthetic photo, whatever the number of photos a second")


@pytest.mark.parametrize("page", PAGES)
def test_pages(page): assert not faults((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [*NOTEBOOKS, *UPLOADED], ids=lambda path: inside(path))
def test_prose_of_notebooks(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not faults("\n\n".join(source(c) for c in cells if c["cell_type"] == "markdown"))


@pytest.mark.parametrize("name", sorted(commands()))
def test_help(name):
    done = command(name.removeprefix("biomass_"), "--help")
    assert done.returncode == 0 and not faults(done.stdout)
