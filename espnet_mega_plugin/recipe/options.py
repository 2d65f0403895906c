"""Command-line options of a recipe script, by the rules of Kaldi's and ESPnet's parse_options.

The script declares its options between two marker lines, one shell assignment each, default and help in place:

    # options begin
    # General
    stage=1             # First stage to run.
    # not --use_k2: k2 does not decode transducers
    # options end

`python3 -m espnet_mega_plugin.recipe.options SCRIPT "$@"` prints the assignments for the shell to eval. Rules:
`--name value` (no `=`), dashes in a name mean underscores, the last occurrence wins, a default of true or false
takes only true or false, a numeric default takes only numbers. A line `# not --name: reason` refuses an option that
users of ESPnet's script know, with its reason.
"""

import difflib
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

DECLARATION = re.compile(r"^([a-z]\w*)=(\"[^\"]*\"|[^\s#]*)\s*(?:# ?(.*))?$")
REFUSAL = re.compile(r"^# not --(\w+): (.*)$")
INTEGER = re.compile(r"^-?\d+$")
NUMBER = re.compile(r"^-?\d*\.?\d+(e-?\d+)?$")


@dataclass(frozen=True)
class Option:
    """One line; an option with a `refusal` takes no value."""

    name: str
    default: str
    help: str
    section: str
    refusal: str = ""


def declared_options(script: Path) -> dict[str, Option]:
    """The options a script declares, in its order."""
    lines = script.read_text(encoding="utf-8").splitlines()
    try:
        first, last = lines.index("# options begin"), lines.index("# options end")
    except ValueError:
        raise ValueError(f"{script} has no lines '# options begin' and '# options end' around its options") from None
    section, options = "", {}
    for line in lines[first + 1 : last]:
        if found := DECLARATION.match(line):
            name, default, text = found.groups()
            options[name] = Option(name, default.strip('"'), text or "", section)
        elif found := REFUSAL.match(line):
            options[found.group(1)] = Option(found.group(1), "", "", section, refusal=found.group(2))
        elif line.startswith("# "):
            section = line[2:]
        elif line.strip():
            raise ValueError(f"{script}: not an option declaration: {line!r}; write name=default  # help")
    return options


def parse(arguments: list[str], options: dict[str, Option]) -> dict[str, str]:
    """The values given on the command line, by option name.

    Raises:
        ValueError: unknown option (with the nearest known ones), missing or ill-typed value, stray argument.
    """
    values = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is no option; options have the form --name value")
        if "=" in flag:
            raise ValueError(f"{flag!r}: write --name value, without '='")
        name = flag[2:].replace("-", "_")
        if name not in options:
            raise ValueError(f"unknown option {flag}{_nearest(name, options)}; --help lists all")
        if options[name].refusal:
            raise ValueError(f"option {flag} of ESPnet's script is not here: {options[name].refusal}")
        if not rest:
            raise ValueError(f"option {flag} needs a value")
        values[name] = _checked(options[name], rest.pop(0))
    return values


def _nearest(name: str, options: dict[str, Option]) -> str:
    here = [known for known, option in options.items() if not option.refusal]
    near = difflib.get_close_matches(name, here, n=3, cutoff=0.5)
    return "; did you mean " + ", ".join(f"--{n}" for n in near) + "?" if near else ""


def _checked(option: Option, value: str) -> str:
    kinds = (
        (option.default in ("true", "false"), value in ("true", "false"), "true or false"),
        (bool(INTEGER.match(option.default)), bool(INTEGER.match(value)), "an integer"),
        (bool(NUMBER.match(option.default)), bool(NUMBER.match(value)), "a number"),
    )
    for applies, fits, expected in kinds:
        if applies and not fits:
            raise ValueError(f"option --{option.name} takes {expected}, not {value!r}")
        if applies:
            break
    return value


def help_text(script: Path, options: dict[str, Option]) -> str:
    """Every option with its default, by section."""
    lines = [f"Usage: {script.name} [--name value]..."]
    section = None
    for option in (option for option in options.values() if not option.refusal):
        if option.section != section:
            section = option.section
            lines += ["", f"{section}:"]
        lines.append(f"  --{option.name:<24} {option.help} (default: {option.default or 'empty'})")
    return "\n".join(lines)


def main() -> None:
    script, arguments = Path(sys.argv[1]), sys.argv[2:]
    options = declared_options(script)
    if "--help" in arguments or "-h" in arguments:
        print(f"printf '%s\\n' {shlex.quote(help_text(script, options))}; exit 0")
        return
    try:
        values = parse(arguments, options)
    except ValueError as error:
        sys.exit(f"{script.name}: {error}")
    for name, value in values.items():
        print(f"{name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
