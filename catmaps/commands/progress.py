"""How far a command is that measures row by row."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count


@contextmanager
def progress(rows: int) -> Iterator[Callable[[str], None]]:
    """Yields what is called after each row, with its name: a bar on stderr, or lines where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        number = count(1)
        yield lambda name: console.print(f"{next(number)}/{rows} {name}", highlight=False, markup=False, soft_wrap=True)
        return
    columns = (
        TextColumn("rows"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=rows)
        yield lambda name: bar.update(task, advance=1, description=name)
