"""A hook of mkdocs: pages link to files beside docs/ (``../benchmarks/results/x.csv``); the site takes those along."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to, under its path in the repository."""
    for page in list(files.documentation_pages()):
        for name in re.findall(r"\]\(\.\./([^)#]+)", page.content_string):
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """On the site the repository's root and docs/ are one folder."""
    return re.sub(r"\]\((\.\./|docs/)", "](", markdown)
