"""mkdocs: links to files of the repository, which are no pages, become their paths; the site needs no repository."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """`[record](../benchmarks/x.json)` reads "record (`benchmarks/x.json`)"; of a missing file mkdocs complains."""
    here = PurePosixPath("docs") / PurePosixPath(page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        file = (ROOT / here / link[2]).resolve()
        if not file.exists() or (ROOT / "docs") in file.parents:
            return link[0]
        path = file.relative_to(ROOT).as_posix()
        return f"`{path}`" if link[1] == path else f"{link[1]} (`{path}`)"

    return LINK.sub(named, markdown)
