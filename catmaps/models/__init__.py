"""Models that come with the package, each the folder of a run without its checkpoints, known by the folder's name.

`words` is a flow map on a BPE of 4,096 and what `catmaps sample` takes when no run is named; `words-base` is the base
it comes from, which `catmaps score` takes. `letters` and `letters-base` are the same on 27 symbols.
A folder of that name where the command runs goes before.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
DEFAULT = Path("words")
BASE = Path("words-base")


def names() -> list[str]:
    """All there are."""
    return sorted(config.parent.name for config in FOLDER.glob("*/config.json"))


def located(path: Path) -> Path:
    """The folder that is meant: `path`, or that of the package's model of this name if there is no such path."""
    return FOLDER / path if not path.exists() and path.parent == Path() and path.name in names() else path


def is_packaged(path: Path) -> bool:
    """Whether a folder belongs to the package, where nothing is written."""
    return path.parent == FOLDER
