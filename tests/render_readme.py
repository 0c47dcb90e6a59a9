"""Print README.md as `nbs/index.ipynb` says it:
markdown and code cells, no outputs, cells marked `#| hide` left out."""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

INDEX = Path(__file__).parent.parent / "nbs" / "index.ipynb"


def render() -> str:
    "The README's text; links to pictures and notebooks are made to work from the repository's root."
    config = Config()
    config.ClearOutputPreprocessor.enabled = True
    config.RegexRemovePreprocessor.patterns = [r"#\|\s*hide"]
    text, _ = MarkdownExporter(config=config).from_notebook_node(nbformat.read(INDEX, as_version=4))
    text = re.sub(r"\]\((?!https?:|#|/)([^)]+)\)", r"](nbs/\1)", text).replace("](nbs/../", "](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__": print(render(), end="")
