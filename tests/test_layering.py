"""Dependencies point down: each package imports only what its place in the layout allows."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import catmaps

ROOT = Path(catmaps.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MAX_LINES = 400
OPTIONAL = {
    "olmo_core",
    "datatrove",
    "pyarrow",
    "matplotlib",
    "scipy",
    "lm_eval",
    "transformers",
    "gguf",
    "accelerate",
    "fastapi",
    "starlette",
    "pydantic",
    "uvicorn",
    "tensorboard",
    "trackio",
    "wandb",
}  # extras: a bare install must import every module
WRAPPERS = {"hub/modeling.py", "hub/generating.py"}  # transformers' classes: imported by users of transformers alone
STEPS = "text/steps.py"  # datatrove's classes: imported by who runs its pipelines alone
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def targets(node: ast.AST, package: str) -> list[str]:
    """Full names of what an import statement, or importlib.import_module("..."), brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        # `from catmaps import flow` imports catmaps.flow: the names count as well as the module.
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        return [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def imports(source: str, package: str) -> set[str]:
    return {name for node in ast.walk(ast.parse(source)) for name in targets(node, package)}


def imports_at_load(source: str, package: str) -> set[str]:
    """Imports that run when the module is loaded: not those in functions or under TYPE_CHECKING."""

    def walk(node: ast.AST) -> Iterator[str]:
        yield from targets(node, package)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not typing_only:
            for child in ast.iter_child_nodes(node):
                yield from walk(child)

    return set(walk(ast.parse(source)))


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def package_of(path: Path) -> str:
    name = module_name(path)
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text(), package_of(path))


def below(folder: str) -> list[Path]:
    return [path for path in FILES if path.is_relative_to(ROOT / folder)]


def stranger(name: str, *allowed: str) -> bool:
    return name.partition(".")[0] not in sys.stdlib_module_names and not inside(name, *allowed)


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_checker_sees_every_kind_of_import() -> None:
    source = "import a.b\nfrom c import d\ndef f():\n    from .. import e\n    import_module('g.h')\n"
    assert imports(source, "p.q") == {"a.b", "c", "c.d", "p", "p.e", "g.h"}
    assert imports_at_load(source, "p.q") == {"a.b", "c", "c.d"}
    guarded = "if TYPE_CHECKING:\n    import x\ntry:\n    import y\nexcept ImportError:\n    pass\n"
    assert imports_at_load(guarded, "p") == {"y"}
    assert stranger("torchvision.x", "torch")
    assert not stranger("torch.nn", "torch")


@pytest.mark.parametrize("path", below("flow"), ids=short)
def test_the_mathematics_stands_alone(path: Path) -> None:
    found = {
        name
        for name in imports_of(path)
        if stranger(name, "torch", "numpy", "jaxtyping", "catmaps.flow", "catmaps.tiles", "catmaps.weights")
    }
    assert not found


@pytest.mark.parametrize("path", below("network"), ids=short)
def test_the_network_knows_no_flow(path: Path) -> None:
    found = {
        name
        for name in imports_of(path)
        if stranger(name, "torch", "jaxtyping", "catmaps.network", "catmaps.tiles", "catmaps.weights")
    }
    assert not found


def test_tiles_stand_below_everything() -> None:
    for name, below in (("weights.py", ()), ("tiles.py", ("catmaps.weights",))):
        assert not {found for found in imports_of(ROOT / name) if stranger(found, "torch", "jaxtyping", *below)}


@pytest.mark.parametrize("path", below("baselines"), ids=short)
def test_baselines_ask_a_network_for_nothing_but_logits(path: Path) -> None:
    allowed = "torch", "numpy", "jaxtyping", "catmaps.flow", "catmaps.baselines"
    assert not {name for name in imports_of(path) if stranger(name, *allowed)}


@pytest.mark.parametrize("path", below("text"), ids=short)
def test_text_knows_neither_mathematics_nor_network_nor_training(path: Path) -> None:
    forbidden = "catmaps.flow", "catmaps.network", "catmaps.training"
    assert not {name for name in imports_of(path) if inside(name, *forbidden)}


@pytest.mark.parametrize("path", FILES, ids=short)
def test_nothing_imports_what_is_not_installed_with_it(path: Path) -> None:
    assert not {name for name in imports_of(path) if inside(name, "tests", "benchmarks", "studies")}


@pytest.mark.parametrize("path", [p for p in FILES if p not in below("training")], ids=short)
def test_only_training_knows_the_engine(path: Path) -> None:
    assert not {name for name in imports_of(path) if inside(name, "olmo_core")}


HTTP = {ROOT / "server" / f"{name}.py" for name in ("app", "guard", "http", "schema")}


@pytest.mark.parametrize("path", [p for p in FILES if p not in {*below("training"), *HTTP}], ids=short)
def test_extras_are_imported_where_they_are_used(path: Path) -> None:
    at_load = imports_at_load(path.read_text(), package_of(path))
    wrapper = short(path) in WRAPPERS
    wrappers = () if wrapper else ("catmaps.hub.modeling", "catmaps.hub.generating", "catmaps.text.steps")
    needed = OPTIONAL - {"transformers"} if wrapper else OPTIONAL - {"datatrove"} if short(path) == STEPS else OPTIONAL
    assert not {name for name in at_load if inside(name, *needed, *wrappers, "catmaps.training")}


@pytest.mark.parametrize("path", [p for p in FILES if p not in below("training")], ids=short)
def test_files_from_elsewhere_never_run_code(path: Path) -> None:
    assert not {name for name in imports_of(path) if inside(name, *PICKLES)}
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    plain = [call for call in calls if "weights_only=True" in {ast.unparse(keyword) for keyword in call.keywords}]
    # Published checkpoints may be pickles: torch's reader of plain tensors is for them alone.
    named = {ast.unparse(call.func) for call in calls if short(path) != "hub/sources.py" or call not in plain}
    assert not named & {"torch.load", "torch.save"}
    keywords = {ast.unparse(keyword) for call in calls for keyword in call.keywords}
    assert not keywords & {"allow_pickle=True", "weights_only=False", "trust_remote_code=True"}


@pytest.mark.parametrize("path", FILES, ids=short)
def test_no_file_outgrows_a_reader(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
