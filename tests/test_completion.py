"""Completion: the options are those of --help, and the shells' own functions complete them."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from catmaps.cli import COMMANDS, main
from catmaps.commands import completion
from catmaps.commands.completion import APART, options
from catmaps.presets import PRESETS


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The script for each shell, in a file."""
    folder = tmp_path_factory.mktemp("completion")
    files = {shell: folder / shell for shell in ("bash", "zsh", "fish")}
    for shell, file in files.items():
        file.write_text(getattr(completion, shell)())
    return files


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([name, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_options_and_their_values_are_those_of_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[str, str] = {}
    for line in re.findall(r"^ +(-.+?)(?:  .*)?$", help_of(name, capsys).partition("\nexamples:")[0], re.M):
        shown |= dict.fromkeys(re.findall(r"(?<!\S)--[a-z][^ ,]*", line), line.split()[-1])
    own = {option: values for option, values in options(name).items() if option not in APART.get(name, {})}
    assert own.keys() == shown.keys()
    for option, values in own.items():
        if values:
            assert set(shown[option].strip("{}").split(",")) - {"None"} == set(values)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("catmaps tra", ["train"]),
        ("catmaps --v", ["--version"]),
        ("catmaps train ", [*PRESETS]),
        ("catmaps train --resu", ["--resume"]),
        ("catmaps train tiny --clock.", ["--clock.law", "--clock.adaptive"]),
        ("catmaps train tiny --clock.law lo", ["logit_normal"]),
        ("catmaps train tiny --training.compile ", ["True", "False"]),
        ("catmaps distill --preset q", ["quickstart"]),
        ("catmaps data b", ["build"]),
        ("catmaps sample runs/map --sampler h", ["heun"]),
        ("catmaps sample runs/map --no-show", ["--no-show-trajectory"]),
        ("catmaps score runs/map nov", []),
        ("catmaps completion f", ["fish"]),
        ("catmaps nonsense --x", []),
    ],
)
def test_shells_complete(typed: str, expected: list[str], scripts: dict[str, Path], tmp_path: Path) -> None:
    words = [*shlex.split(typed), *([""] if typed.endswith(" ") else [])]
    line = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _catmaps"
    assert ask("bash", "--norc", "-uc", f'. {scripts["bash"]}; {line}; printf "%s\\n" "${{COMPREPLY[@]}}"') == expected
    if shutil.which("fish"):
        script = f"cd {tmp_path}; . {scripts['fish']}; complete -C {shlex.quote(typed)}"
        own = {said.split("\t")[0] for said in ask("fish", "--no-config", "-c", script)}
        assert own == set(expected) - {"--version"}


def ask(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


def test_zsh_takes_it(scripts: dict[str, Path]) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("no zsh here")
    assert ask("zsh", "-fc", f". {scripts['zsh']}; print $_comps[catmaps]") == ["_bash_complete -o default -F _catmaps"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_command_prints_the_script(
    shell: str, scripts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == scripts[shell].read_text()
