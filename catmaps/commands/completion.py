"""`catmaps completion`: what a shell needs to complete commands, presets, options and their values."""

import contextlib
import importlib
import io
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from catmaps.cli import COMMANDS, Helped, parse
from catmaps.presets import DISTILLATIONS, PRESETS

Values = tuple[str, ...]

FIRST: dict[str, Values] = {
    "train": tuple(PRESETS),
    "plan": tuple(PRESETS),
    "info": tuple(PRESETS),
    "data": ("build",),
    "study": ("run", "report"),
    "completion": ("bash", "zsh", "fish"),
}
"""Words that may follow a command at once; where there are none, and beside those of plan and info, files may."""

APART: dict[str, dict[str, Values | None]] = {
    "train": {"--resume": (), "--from": ()},
    "distill": {"--from": (), "--preset": tuple(DISTILLATIONS)},
    "plan": {"--distill": None},
}
"""Options that a command takes before its dataclass is read."""

BASH = """\
_catmaps() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words="" first="" options="" values=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands} --help --version"
  else
    case "${{COMP_WORDS[1]}}" in
{commands_of}
    esac
    case "${{COMP_WORDS[1]}} $before" in
{values_of}
    esac
    case "$current" in
      -*) words=$options ;;
      *)
        words=$values
        if [ "$COMP_CWORD" -eq 2 ]; then words=$first; fi
        ;;
    esac
  fi
  COMPREPLY=( $(compgen -W "$words" -- "$current") )
}}
complete -o default -F _catmaps catmaps
"""


@dataclass(frozen=True)
class Completion:
    """A script that lets a shell complete commands, presets, options and their values; it calls nothing.

    Keep it in a file: bash reads ~/.local/share/bash-completion/completions/catmaps by itself, fish
    ~/.config/fish/completions/catmaps.fish, and zsh what ~/.zshrc sources.
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Whose."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        script = {"bash": bash, "zsh": zsh, "fish": fish}[self.shell]()
        print(script, end="")
        return {"shell": self.shell, "script": script}


def options(name: str) -> dict[str, Values | None]:
    """A command's options, each with the values it may have: () for any, None for a flag, which has none."""
    module = importlib.import_module(f"catmaps.commands.{COMMANDS[name].module}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module.read(name, ["--help"])
    except Helped as helped:
        return {"--help": None} | APART.get(name, {}) | _options(helped.kind, "", flags=True)
    raise AssertionError(f"catmaps {name} --help is answered by `parse`")


def _options(kind: type[Any], prefix: str, *, flags: bool) -> dict[str, Values | None]:
    """By tyro's rules; a dataclass in a command's own is the configuration, whose parts alone have prefixes."""
    found: dict[str, Values | None] = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint, marks = hints[field.name], ()
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
        if tyro.conf.Suppress in marks or tyro.conf.Positional in marks:
            continue
        name = field.name.replace("_", "-")
        if is_dataclass(hint) and isinstance(hint, type):
            inner = "" if tyro.conf.FlagConversionOff in marks else f"{prefix}{name}."
            found |= _options(hint, inner, flags=False)
        elif hint is bool and flags:
            found |= {f"--{name}": None, f"--no-{name}": None}
        else:
            found[f"--{prefix}{name}"] = ("True", "False") if hint is bool else _choices(hint)
    return found


def _choices(hint: Any) -> Values:
    """The words of a Literal, or of "one of these or None"."""
    if get_origin(hint) is Literal:
        return tuple(get_args(hint))
    return tuple(word for part in get_args(hint) for word in _choices(part))


def bash() -> str:
    commands_of, values_of = [], []
    for name in COMMANDS:
        own = options(name)
        first = " ".join(FIRST.get(name, ()))
        commands_of.append(f'      {name}) first="{first}" options="{" ".join(own)}" ;;')
        values_of += [f'      "{name} {word}") values="{" ".join(v)}" ;;' for word, v in own.items() if v]
    tables = {"commands_of": "\n".join(commands_of), "values_of": "\n".join(values_of)}
    return BASH.format(commands=" ".join(COMMANDS), **tables)


def zsh() -> str:
    """bash's, by zsh's own emulation."""
    return f"autoload -U compinit bashcompinit\n(( $+functions[compdef] )) || compinit -u\nbashcompinit\n{bash()}"


def fish() -> str:
    lines = []
    for name, entry in COMMANDS.items():
        about = entry.summary.partition(":")[0].replace("'", "\\'")
        lines.append(f"complete -c catmaps -n __fish_use_subcommand -f -a {name} -d '{about}'")
    for name in COMMANDS:
        seen = f"__fish_seen_subcommand_from {name}"
        if name in FIRST:
            second = f"{seen}; and test (count (commandline -opc)) -eq 2"
            lines.append(f"complete -c catmaps -n '{second}' -a '{' '.join(FIRST[name])}'")
        for option, values in options(name).items():
            given = "" if values is None else f" -x -a '{' '.join(values)}'" if values else " -r"
            lines.append(f"complete -c catmaps -n '{seen}' -l {option.removeprefix('--')}{given}")
    return "\n".join(lines) + "\n"


def read(name: str, args: list[str]) -> Completion:
    return parse(Completion, args, f"catmaps {name}")
