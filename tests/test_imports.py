"""Who may import whom: the rooms know nothing of one another, and torch finds a package that does not import torch."""

import ast
import sys
from pathlib import Path

import pytest
from fresh_python import python

import espnet_mega_plugin

ROOT = Path(espnet_mega_plugin.__file__).parent
STDLIB = sys.stdlib_module_names
ROOMS = {
    "rnnt": {"torch", "triton", *(f"espnet_mega_plugin.{name}" for name in ("rnnt", "processor", "once"))},
    "recording.py": {"torch"},
    "processor.py": {"torch"},
    "replica.py": {"torch"},
    "once.py": {"torch"},
    "mega": {
        "torch",
        "numpy",
        *(f"espnet_mega_plugin.{name}" for name in ("mega", "recording", "processor", "replica", "once")),
    },
    "search": {"torch", "numpy", *(f"espnet_mega_plugin.{name}" for name in ("search", "recording", "replica"))},
    "decoder.py": {"torch", "espnet2", "espnet_mega_plugin.mega", "espnet_mega_plugin.recording"},
    "model.py": {"torch", "espnet2", "espnet_mega_plugin.rnnt", "espnet_mega_plugin.espnet_search"},
    "espnet_search.py": {"torch", "espnet2", "espnet_mega_plugin.search", "espnet_mega_plugin.replica"},
    "decode": {
        "torch",
        "numpy",
        "yaml",
        "tqdm",
        "espnet2",
        "espnet_mega_plugin.attach",
        "espnet_mega_plugin.search",
        "espnet_mega_plugin.decode",
    },
    "pictures": {
        "torch",
        "numpy",
        "matplotlib",
        "lightning",
        "wandb",
        "yaml",
        "espnet2.text",
        "espnet_mega_plugin.mega",
        "espnet_mega_plugin.pictures",
        "espnet_mega_plugin.recipe.kaldi_dir",
    },
}
# What torch itself imports, and what must run where torch or ESPnet is broken
LIGHT = ("__init__.py", "__main__.py", "attach.py", "doctor.py", "run.py")


def imported(tree: ast.AST) -> set[str]:
    """Modules that the statements below a node import, as absolute names; a name taken from a package is one of them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            deeper = node.module == "espnet_mega_plugin"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if deeper else {node.module}
    return found


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / room]


@pytest.mark.parametrize("room", [room for room in ROOMS if (ROOT / room).exists()])
def test_a_room_imports_only_what_its_arrows_allow(room):
    assert files(room)
    for file in files(room):
        for module in imported(ast.parse(file.read_text(), str(file))):
            allowed = module.partition(".")[0] in STDLIB or any(f"{module}.".startswith(f"{a}.") for a in ROOMS[room])
            assert allowed, f"{file.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("name", LIGHT)
def test_what_torch_imports_needs_only_the_standard_library_at_its_top(name):
    tree = ast.parse((ROOT / name).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    top = ast.Module([node for node in tree.body if not isinstance(node, (*functions, ast.ClassDef))], [])
    allowed = {f"espnet_mega_plugin.{name}" for name in ("__version__", "attach")}
    assert {module for module in imported(top) if module.partition(".")[0] not in STDLIB} <= allowed


def test_importing_the_package_loads_neither_torch_nor_espnet(tmp_path):
    modules = "espnet_mega_plugin, espnet_mega_plugin.attach, espnet_mega_plugin.run, espnet_mega_plugin.doctor"
    code = f"import {modules}, sys; print({{'torch', 'numpy', 'espnet', 'espnet2', 'espnet3'}} & set(sys.modules))"
    assert python("-c", code, cwd=tmp_path)[0] == "set()\n"


def test_every_public_name_is_found_and_others_are_refused():
    for name in espnet_mega_plugin.__all__:
        assert getattr(espnet_mega_plugin, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'MegaDecoder'"):
        espnet_mega_plugin.MegaDecoder  # noqa: B018
