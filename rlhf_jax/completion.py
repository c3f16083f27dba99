"""`rlhf-jax completion SHELL`: a script that completes commands, flags, experiments and kinds of stages."""

import contextlib
import importlib
import io
import re
from collections.abc import Iterator

from rlhf_jax.api import included_experiments
from rlhf_jax.cli.output import until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.main import VERBS
from rlhf_jax.stages.kinds import KINDS

DESCRIPTION = """\
Print a script that completes the commands of rlhf-jax, their flags, the names of
experiments after --config=, and kinds of stages. To install it, write it where
your shell looks for completions:

  rlhf-jax completion bash > ~/.local/share/bash-completion/completions/rlhf-jax
  rlhf-jax completion zsh > ~/.zfunc/_rlhf-jax       (a directory of $fpath)
  rlhf-jax completion fish > ~/.config/fish/completions/rlhf-jax.fish"""

BASH = """\
# Completion of rlhf-jax for bash; zsh reads it through bashcompinit.
_rlhf_jax() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="" flag="" words="" verb="${{COMP_WORDS[1]}}"
    [ "$COMP_CWORD" -gt 0 ] && before="${{COMP_WORDS[COMP_CWORD-1]}}"
    if [ "$word" = "=" ]; then word=""; flag="$before"; fi
    [ "$before" = "=" ] && flag="${{COMP_WORDS[COMP_CWORD-2]}}"
    case "$verb" in
{cases}
        *) words="{run}" ;;
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then words="{verbs} $words"; fi
    if [ "$flag" = "--config" ]; then words="{experiments}"; elif [ -n "$flag" ]; then words=""; fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [ "${{#COMPREPLY[@]}}" -gt 0 ] || COMPREPLY=($(compgen -f -- "$word"))
}}
"""
ENDINGS = {
    "bash": "complete -o nospace -F _rlhf_jax rlhf-jax",
    "zsh": "complete -o nospace -F _rlhf_jax rlhf-jax",
}


def completion_verb(arguments: list[str]) -> None:
    """Print the script for a shell."""
    parser = Parser("rlhf-jax completion", DESCRIPTION)
    parser.add_argument("shell", choices=["bash", "zsh", "fish"], help="shell that reads the script")
    shell = parser.parse_args(arguments).shell
    with until_closed():
        print("\n".join(_fish()) if shell == "fish" else _bash(shell))


def flags_of_verbs() -> dict[str, list[str]]:
    """The flags of every command, from its `--help`; kinds of stages for `fields`."""
    found = {}
    for verb, place in VERBS.items():
        module, function = place.split(":")
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            getattr(importlib.import_module(module), function)(["--help"])
        listed = re.findall(r"^ +(?:-h, )?(--[a-z][a-z-]*)( [A-Z{])?", printed.getvalue(), re.MULTILINE)
        found[verb] = [*dict.fromkeys(f"{flag}=" if value else flag for flag, value in listed)]
    return found | {"fields": [*found["fields"], *KINDS], "completion": ["bash", "zsh", "fish"]}


def _bash(shell: str) -> str:
    flags = flags_of_verbs()
    cases = "\n".join(f'        {verb}) words="{" ".join(words)}" ;;' for verb, words in flags.items() if words)
    script = BASH.format(
        cases=cases, run=" ".join(flags["run"]), verbs=" ".join(flags), experiments=" ".join(_experiments())
    )
    start = "#compdef rlhf-jax\nautoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"{start}{script}{ENDINGS[shell]}"


def _fish() -> Iterator[str]:
    flags = flags_of_verbs()
    yield "# Completion of rlhf-jax for fish."
    yield f"complete -c rlhf-jax -n __fish_use_subcommand -a '{' '.join(flags)}'"
    for verb, words in flags.items():
        seen = f"-n '__fish_seen_subcommand_from {verb}'"
        for word in words:
            if not word.startswith("--"):
                yield f"complete -c rlhf-jax {seen} -f -a {word}"
            elif word == "--config=":
                yield f"complete -c rlhf-jax {seen} -l config -r -a '{' '.join(_experiments())}'"
            else:
                yield f"complete -c rlhf-jax {seen} -l {word.strip('-=')}{' -r' if word.endswith('=') else ''}"


def _experiments() -> list[str]:
    """Short names of the installed experiments, and their smoke variants."""
    names = [name.rpartition(".")[2] for name in included_experiments()]
    return [variant for name in names for variant in (name, f"{name}:smoke")]
