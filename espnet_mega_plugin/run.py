"""DOOR 2: runs any ESPnet command with the plugin attached.

    python -m espnet_mega_plugin.run -m espnet2.bin.asr_transducer_train --config conf/train_mega.yaml ...
    ./asr.sh --python "python3 -m espnet_mega_plugin.run" ...

The command runs as `python -m module ...` or `python script.py ...` would run it, with one difference: `__main__` bears
this module's name. A spawned worker imports the main module again by that name before it looks up ESPnet's classes; it
finds this file, attaches the plugin, and then loads the command's own definitions as the worker of a plain run would.
Under a wrapper that hands over its name as well (runpy does), workers build ESPnet's own class, silently.
"""

import importlib.util
import logging
import os
import sys
from types import CodeType, ModuleType

from espnet_mega_plugin.attach import SWITCH, attach, is_off

HELP = """usage: python -m espnet_mega_plugin.run [-m] MODULE [ARGUMENT ...]
       python -m espnet_mega_plugin.run SCRIPT.py [ARGUMENT ...]

Runs an ESPnet command with the plugin attached: `decoder: mega` is the plugin's, in spawned workers too. Usable as
asr.sh's --python "python3 -m espnet_mega_plugin.run". With ESPNET_MEGA_PLUGIN=0 the command runs as it is.

example: python -m espnet_mega_plugin.run espnet2.bin.asr_transducer_train --help
"""

# How a spawned worker learns what its parent runs: "script PATH" or "module NAME"
_COMMAND = "_ESPNET_MEGA_PLUGIN_COMMAND"

_log = logging.getLogger("espnet_mega_plugin")


def main(argv: list[str] | None = None) -> int:
    """Runs the command that `argv` names (default: this process's own arguments); its exceptions pass through.

    Returns:
        0 when the command came to its end; 2 when there is nothing to run, with the reason on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    by_name = argv[:1] == ["-m"]
    target, arguments = (argv[by_name:][:1] or [""])[0], argv[by_name + 1 :]
    by_name = by_name or not (target.endswith(".py") or os.path.isfile(target))
    try:
        if not target or target.startswith("-"):
            raise FileNotFoundError(f"expected a module or a script first, got {target!r} (see --help)")
        if by_name and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
            sys.path[0] = os.getcwd()  # as `python -m` has it; a console script had its own folder there
        code, path, package = _module(target) if by_name else _script(target)
    except FileNotFoundError as error:
        print(f"espnet_mega_plugin.run: {error}", file=sys.stderr)
        return 2

    if is_off():
        _log.warning("espnet_mega_plugin is off by %s=%s; %s runs as it is.", SWITCH, os.environ[SWITCH], target)
    if not by_name:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    sys.argv = [path if by_name else target, *arguments]
    os.environ[_COMMAND] = f"module {target}" if by_name else f"script {path}"
    main_module = ModuleType("__main__")
    main_module.__spec__ = sys.modules[__name__].__spec__  # the name that spawned workers import
    sys.modules["__main__"] = main_module
    _execute(code, path, package, vars(main_module))
    return 0


def _module(name: str) -> tuple[CodeType, str, str]:
    """Code, file and package of a module, or of a package's __main__."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the package is there and something it imports is not
        spec = None
    code = None if spec is None or not hasattr(spec.loader, "get_code") else spec.loader.get_code(spec.name)
    if code is None:
        raise FileNotFoundError(f"no Python module named {name!r} can be run; is it installed in {sys.executable}?")
    return code, spec.origin, spec.parent


def _script(name: str) -> tuple[CodeType, str, str]:
    """Code and file of a script, which belongs to no package."""
    path = os.path.abspath(name)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {name!r} in {os.getcwd()}")
    with open(path, "rb") as file:
        return compile(file.read(), path, "exec"), path, ""


def _execute(code: CodeType, path: str, package: str, namespace: dict) -> None:
    namespace.update(__file__=path, __package__=package, __builtins__=__builtins__)
    exec(code, namespace)


def _follow_parent() -> None:
    """In a spawned worker: loads what the parent's command defines, so that its functions can be unpickled."""
    kind, _, target = os.environ.get(_COMMAND, "").partition(" ")
    if kind:
        code, path, package = _module(target) if kind == "module" else _script(target)
        _execute(code, path, package, globals())


attach()  # at import, not in main(): in a spawned worker only the import happens
if __name__ == "__mp_main__":
    _follow_parent()
elif __name__ == "__main__":
    sys.exit(main())
