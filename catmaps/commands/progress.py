"""The bar of commands that measure row by row."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(rows: int) -> Iterator[Callable[[str], None]]:
    """A bar of rows on stderr; yields what is called after each, with its name."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("rows"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=rows)
        yield lambda name: bar.update(task, advance=1, description=name)
