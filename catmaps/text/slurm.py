"""Scripts that build shards in a Slurm array: written, to be read and submitted by hand."""

import shlex
import sys
from pathlib import Path

from catmaps.errors import UserError
from catmaps.text.tasks import LOGS, read_plan

_TASKS = """\
#!/usr/bin/env bash
#SBATCH --job-name=catmaps-data
#SBATCH --array={array}
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=12:00:00
#SBATCH --output={logs}/slurm-%A-%a.out
# Tokenises the files of one task; a task that is done already ends at once.
set -euo pipefail
exec {catmaps} data task {folder} --task "$SLURM_ARRAY_TASK_ID"
"""
_JOIN = """\
#!/usr/bin/env bash
#SBATCH --job-name=catmaps-join
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=2:00:00
#SBATCH --output={logs}/slurm-%j.out
# Makes the parts one directory of shards.
set -euo pipefail
exec {catmaps} data join {folder} --out {out}{overwrite}
"""
_SUBMIT = """\
#!/usr/bin/env bash
# Submits both. Partition and account are sbatch's own variables: SBATCH_PARTITION=cpu SBATCH_ACCOUNT=a bash submit.sh
set -euo pipefail
array=$(sbatch --parsable {tasks})
sbatch --dependency="afterok:${{array%%;*}}" {join}
"""


def write_scripts(folder: Path, out_dir: Path, *, workers: int, overwrite: bool = False) -> Path:
    """Writes tasks.sbatch, join.sbatch and submit.sh into the folder of a planned build; submits nothing.

    Args:
        folder: See `make_plan`.
        out_dir: Of the shards.
        workers: Array jobs at a time.
        overwrite: Replace shards at `out_dir`.

    Returns:
        submit.sh.
    """
    folder, out_dir = folder.absolute(), out_dir.absolute()
    (folder / LOGS).mkdir(exist_ok=True)
    words = {
        "array": f"0-{read_plan(folder).tasks - 1}%{workers}",
        "logs": str(folder / LOGS).replace("%", "%%"),
        "catmaps": f"{shlex.quote(sys.executable)} -m catmaps",
        "folder": shlex.quote(str(folder)),
        "out": shlex.quote(str(out_dir)),
        "overwrite": " --overwrite" if overwrite else "",
        "tasks": shlex.quote(str(folder / "tasks.sbatch")),
        "join": shlex.quote(str(folder / "join.sbatch")),
    }
    if any(character.isspace() for character in words["logs"]):
        raise UserError(f"{folder} has a space in its name, which #SBATCH lines cannot hold: choose another --out")
    for name, template in (("tasks.sbatch", _TASKS), ("join.sbatch", _JOIN), ("submit.sh", _SUBMIT)):
        (folder / name).write_text(template.format(**words), encoding="utf-8")
    return folder / "submit.sh"
