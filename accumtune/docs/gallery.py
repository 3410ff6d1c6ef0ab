"""For MkDocs: the gallery is the README of `experiments/` with its pictures."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
PAGES = "../accumtune/docs/pages/"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#]+)\)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    files.append(File.generated(config, "gallery.md", content=gallery()))
    for picture in sorted((EXPERIMENTS / "pictures").iterdir()):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    return files


def gallery() -> str:
    text = (EXPERIMENTS / "README.md").read_text()
    return LINK.sub(_link, text.replace("# Experiments", "# Gallery", 1))


def _link(found: re.Match[str]) -> str:
    """Rewrites a link for the site: pages stay links, files that only the repository has become names."""
    text, target = found.groups()
    if target.startswith(PAGES):
        return f"[{text}]({target.removeprefix(PAGES)})"
    return found[0] if "://" in target else f"`experiments/{target}`"
