"""The command line: `python -m espnet_mega_plugin COMMAND ...`, also installed as `espnet-mega`.

A command is a module with `main(argv) -> exit status`; it is imported when it is called.
"""

import importlib
import sys

from espnet_mega_plugin import __version__

COMMANDS = {
    "decode": ("espnet_mega_plugin.decode", "decode in batches: ESPnet's options, the same files, and time stamps"),
    "doctor": ("espnet_mega_plugin.doctor", "check this installation: what decodes, which loss, what is missing"),
    "pictures": ("espnet_mega_plugin.pictures.command", "draw what a trained decoder attends to, and its EMA kernels"),
    "run": ("espnet_mega_plugin.run", "run an ESPnet command with the plugin attached"),
}


def help_page() -> str:
    lines = "".join(f"  {name:<8} {summary}\n" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: python -m espnet_mega_plugin [--version] [--help] COMMAND [ARGUMENT ...]\n\n"
        f"The MEGA transducer for ESPnet, {__version__}.\n\ncommands:\n{lines}\n"
        "`python -m espnet_mega_plugin COMMAND --help` explains a command.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Calls one command; 2 for an unknown one."""
    command, *arguments = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if command in ("-h", "--help"):
        print(help_page(), end="")
        return 0
    if command == "--version":
        print(f"espnet-mega-plugin {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"espnet_mega_plugin: no command {command!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[command][0]).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
