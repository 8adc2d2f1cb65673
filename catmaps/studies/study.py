"""What a study is: study.json, its arms, and the configuration of each.

    {"name": "clock", "question": "...", "preset": "small", "common": {"network.width": 128},
     "arms": {"warp": {"clock.law": "warp"}, ...}, "grid": {"clock.adaptive": [true, false]},
     "seeds": [0, 1], "budget": {"cpu_minutes": 3}, "baseline": "warp", "measures": ["nelbo", "curve"]}

Fields are called as on the command line. With `arms` and `grid` both, every named arm is crossed with the grid.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from catmaps.config import Config, config_from, flat
from catmaps.errors import UserError
from catmaps.presets import PRESETS, agree, distilled, preset_of

FILE = "study.json"
OWN = ("training.steps", "training.seed")
"""Fields that budget and seeds set."""
Overrides = dict[str, Any]
"""Fields by their names on the command line."""


class Arm(NamedTuple):
    """What is compared: overrides of the study's configuration."""

    name: str
    overrides: Overrides


class Job(NamedTuple):
    """An arm with a seed: one training."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.seed}"


@dataclass(frozen=True)
class Halving:
    """Successive halving: at every rung, a share of the budget, the better `keep` of the arms go on."""

    keep: float = 0.5
    rungs: tuple[float, ...] = (0.25, 0.5, 1.0)

    def __post_init__(self) -> None:
        ordered = all(a < b for a, b in zip(self.rungs, self.rungs[1:], strict=False))
        if not (0 < self.keep < 1 and self.rungs and self.rungs[0] > 0 and self.rungs[-1] == 1 and ordered):
            raise ValueError("halving: keep lies between 0 and 1, rungs rise to 1")


PER_PARAMETER = "tokens_per_parameter"
"""A budget that grows with the network: of parameters other than the vocabulary's."""


@dataclass(frozen=True)
class Study:
    """A study.json, checked. Every problem of it is a UserError of one line that names the field."""

    folder: Path
    name: str
    question: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    budget: dict[str, float]
    """{"tokens": n}, {"tokens_per_parameter": r} or {"cpu_minutes": m}."""
    measures: tuple[tuple[str, dict[str, Any]], ...]
    """Names, and what they are asked to do differently."""
    baseline: str | Overrides
    """The arm that others are compared with; or fields, at whose values an arm's own baseline stands."""
    preset: str = "small"
    base: str | None = None
    """The run that every arm distils."""
    common: Overrides = field(default_factory=dict)
    halving: Halving | None = None

    def arm(self, name: str) -> Arm:
        found = next((arm for arm in self.arms if arm.name == name), None)
        if found is None:
            raise UserError(f"{self.file} has no arm {name}; there are {', '.join(arm.name for arm in self.arms)}")
        return found

    @property
    def file(self) -> Path:
        return self.folder / FILE

    def baseline_of(self, arm: Arm) -> Arm:
        """The arm it is compared with; the baseline's own is itself."""
        if isinstance(self.baseline, str):
            return self.arm(self.baseline)
        wanted = arm.overrides | self.baseline
        found = next((other for other in self.arms if other.overrides == wanted), None)
        if found is None:
            raise UserError(f"{self.file}: there is no arm like {arm.name} with baseline {json.dumps(self.baseline)}")
        return found

    def config(self, job: Job, steps: int) -> Config:
        """The configuration of a training of so many steps."""
        start = preset_of(self.preset) if self.base is None else distilled(self.base, self.preset)
        own = {"training.threads": 1, **self.common, **job.arm.overrides}
        config = override(start, own | {"training.steps": steps, "training.seed": job.seed}, self._where(job.arm))
        if self.base is not None:
            try:
                agree(config, start, self.base)
            except UserError as error:
                raise UserError(f"{self._where(job.arm)}: {error}") from error
        return config

    def check(self) -> None:
        """UserError if an arm has no configuration: every mistake is better found before the first training."""
        for arm in self.arms:
            self.config(Job(arm, self.seeds[0]), 1)

    def steps(self, arm: Arm) -> int | None:
        """Steps of an arm's trainings, where the budget itself says so; None for CPU minutes."""
        (kind, amount), *_ = self.budget.items()
        if kind not in ("tokens", PER_PARAMETER):
            return None
        from catmaps.training.shapes import Shape, parameters

        config = self.config(Job(arm, 0), 1)
        tokens = amount * parameters(Shape.of(config, 2)).body if kind == PER_PARAMETER else amount
        return max(1, round(tokens / (config.training.batch * config.data.length)))

    def _where(self, arm: Arm) -> str:
        return f"{self.file}, arm {arm.name}"


def override(config: Config, values: Overrides, where: str) -> Config:
    """A configuration with some fields changed, by their names on the command line.

    Raises:
        UserError: No such field, or a value it cannot have.
    """
    known, tree = flat(config), asdict(config)
    for name, value in values.items():
        if name not in known or name in ("preset", "base", "published"):
            raise UserError(f"{where}: there is no field {name}; they are those of `catmaps train --help`")
        part, _, key = name.rpartition(".")
        (tree[part] if part else tree)[key] = value
    return config_from(tree, where)


def read_study(folder: Path) -> Study:
    """Reads FOLDER/study.json.

    Raises:
        UserError: It is missing, no JSON, or says something that cannot be done; names it.
    """
    folder = folder.parent if folder.name == FILE else folder
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"there is no {file}; docs/studies.md says how to write one")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        study = _study(folder, values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: {error}") from error
    for arm in study.arms:
        study.baseline_of(arm)
    return study


NAMES = {"name", "question", "preset", "from", "common", "arms", "grid", "seeds", "budget", "baseline", "measures"}
NAMES = NAMES | {"halving"}
NEEDED = ("name", "question", "seeds", "budget", "baseline", "measures")


def _study(folder: Path, values: Any) -> Study:
    if not isinstance(values, dict):
        raise ValueError("it is not an object")
    if odd := sorted(set(values) - NAMES) or [name for name in NEEDED if name not in values]:
        raise ValueError(f"{'unknown' if odd[0] in values else 'missing'} field {odd[0]}")
    if not re.fullmatch(r"[\w-]+", str(values["name"])):
        raise ValueError(f"name {values['name']!r} has to be letters, digits, - and _")
    base, preset = values.get("from"), values.get("preset", "distill" if "from" in values else "small")
    if base is None and preset not in PRESETS:
        raise ValueError(f"there is no preset {preset}; there are {', '.join(PRESETS)}")
    return Study(
        folder=folder,
        name=str(values["name"]),
        question=str(values["question"]),
        arms=_arms(_object(values, "arms"), _object(values, "grid")),
        seeds=_seeds(values["seeds"]),
        budget=_budget(values["budget"]),
        measures=_measures(values["measures"]),
        baseline=values["baseline"],
        preset=preset,
        base=base,
        common=_checked(_object(values, "common")),
        halving=_halving(values["halving"]) if "halving" in values else None,
    )


def _object(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, dict):
        raise ValueError(f"{name} is not an object")
    return found


def _checked(overrides: Any) -> Overrides:
    if not isinstance(overrides, dict):
        raise ValueError(f"{json.dumps(overrides)} is not an object of fields")
    for name in OWN:
        if name in overrides:
            raise ValueError(f"{name} is set by {'budget' if name == OWN[0] else 'seeds'}: leave it out")
    return overrides


def _arms(named: dict[str, Any], grid: dict[str, Any]) -> tuple[Arm, ...]:
    """Named arms, crossed with the grid's product; arms of a grid are called by its values."""
    for name, choices in grid.items():
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"grid: {name} needs a list of values")
    cells = [dict(zip(grid, chosen, strict=True)) for chosen in product(*grid.values())]
    arms = [
        Arm("-".join([*([name] if name else []), *_labels(cell)]), _checked(overrides) | _checked(cell))
        for name, overrides in (named or {"": {}}).items()
        for cell in cells
    ]
    if not (named or grid):
        raise ValueError("it needs arms or a grid")
    for i, arm in enumerate(arms):
        if not re.fullmatch(r"[\w.+-]+", arm.name):
            raise ValueError(f"arm {arm.name!r}: names are letters, digits, . + - and _, as they name folders")
        if arm.name in {other.name for other in arms[:i]}:
            raise ValueError(f"two arms are called {arm.name}")
    return tuple(arms)


def _labels(cell: Overrides) -> list[str]:
    """A short word per field: a value that speaks for itself, or its field before it."""

    def word(name: str, value: Any) -> str:
        last = name.rpartition(".")[2]
        if isinstance(value, bool):
            return last if value else f"no_{last}"
        text = re.sub(r"[^\w.+-]+", "", f"{value:g}" if isinstance(value, float) else str(value))
        return text if isinstance(value, str) else f"{last}{text}"

    return [word(name, value) for name, value in cell.items()]


def _seeds(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not values or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError("seeds is a list of numbers from 0")
    return tuple(dict.fromkeys(values))


def _budget(value: Any) -> dict[str, float]:
    kinds = ("tokens", PER_PARAMETER, "cpu_minutes")
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in kinds:
        raise ValueError('budget is {"tokens": N}, {"tokens_per_parameter": R} or {"cpu_minutes": M}')
    (kind, amount), *_ = value.items()
    if isinstance(amount, bool) or not isinstance(amount, int | float) or amount <= 0:
        raise ValueError(f"budget: {kind} must be positive, not {amount!r}")
    return {kind: float(amount)}


def _measures(values: Any) -> tuple[tuple[str, dict[str, Any]], ...]:
    from catmaps.studies.measures import checked

    if not isinstance(values, list) or not values:
        raise ValueError("measures is a list of names; the first ranks the arms")
    return tuple(checked(value) for value in values)


def _halving(value: Any) -> Halving:
    known = [f.name for f in fields(Halving)]
    if not isinstance(value, dict) or set(value) - set(known):
        raise ValueError(f"halving is an object with {' and '.join(known)}, not {json.dumps(value)}")
    rungs = value.get("rungs", list(Halving.rungs))
    if not isinstance(rungs, list):
        raise ValueError("halving: rungs is a list of shares of the budget")
    return Halving(float(value.get("keep", Halving.keep)), tuple(map(float, rungs)))
