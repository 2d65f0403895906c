"""A recipe of the plugin inside an ESPnet checkout, or beside one, run by the checkout's own asr.sh.

    python3 -m espnet_mega_plugin.recipe.checkout ~/espnet egs/mini_an4/asr1
    python3 -m espnet_mega_plugin.recipe.checkout ~/espnet egs/mini_an4/asr1 --here work/an4

The first makes ~/espnet/egs2/mini_an4/asr_mega1, the second work/an4, linked to ~/espnet. The folder has what ESPnet's
recipes have (asr.sh, path.sh, cmd.sh, scripts, pyscripts, steps, utils, conf, local), with the configurations and the
data stage of the plugin's recipe, and a run.sh with its options. May be run again.
The Python of the checkout needs the plugin: `pip install` it there. Checkout and installed ESPnet must be one version.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

TEMPLATE = Path("egs2/TEMPLATE/asr1")
LINKED = ("asr.sh", "db.sh", "scripts", "pyscripts", "steps", "utils")
MADE = "# Made by espnet_mega_plugin.recipe.checkout"
ENGINE = re.compile(r"^\S*TEMPLATE/asr1/asr\.sh \\$", re.MULTILINE)
# The plugin's defaults where ESPnet's asr.sh has others that its transducer task cannot use
OPTIONS = (
    '--asr_task asr_transducer --python "python3 -m espnet_mega_plugin.run" --ngpu 0 --use_lm false \\\n'
    "    --inference_asr_model valid.loss.ave.pth \\"
)
PATH = """\
{made}; sourced by asr.sh. As ESPnet's, for a recipe outside of its checkout.
MAIN_ROOT=${{ESPNET_ROOT:-{root}}}
export PATH=${{PWD}}/utils:${{PATH}}
export LC_ALL=C
export PYTHONIOENCODING=UTF-8
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-1}}
[ ! -f "${{MAIN_ROOT}}/tools/activate_python.sh" ] || . "${{MAIN_ROOT}}/tools/activate_python.sh"
[ ! -f "${{MAIN_ROOT}}/tools/extra_path.sh" ] || . "${{MAIN_ROOT}}/tools/extra_path.sh"
. local/path.sh
"""


def link(checkout: Path, recipe: Path, folder: Path | None = None) -> Path:
    """Make the recipe's folder; returns it.

    folder: where, outside of the checkout; None: `egs2/<corpus>/asr_mega1` in it.

    Raises:
        FileNotFoundError: `checkout` is no ESPnet checkout, or `recipe` no recipe of the plugin.
        FileExistsError: the folder holds a run.sh that was not made here.
    """
    checkout, recipe = checkout.resolve(), recipe.resolve()
    template = checkout / TEMPLATE
    if not (template / "asr.sh").is_file():
        raise FileNotFoundError(f"{checkout} is no ESPnet checkout: it has no {TEMPLATE}/asr.sh")
    script = recipe / "run.sh"
    if not script.is_file() or not ENGINE.search(script.read_text(encoding="utf-8")):
        raise FileNotFoundError(f"{recipe} is no recipe of the plugin: no run.sh that calls TEMPLATE/asr1/asr.sh")
    inside = folder is None
    folder = checkout / "egs2" / recipe.parent.name / "asr_mega1" if inside else folder.absolute()
    run = folder / "run.sh"
    if run.exists() and MADE not in run.read_text(encoding="utf-8"):
        raise FileExistsError(f"{run} is there and was not made by this command; choose another folder with --here")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*LINKED, *(("path.sh",) if inside else ())):
        target = Path("../../TEMPLATE/asr1") / name if inside else template / name
        _symlink(folder / name, target)
    if not inside:
        (folder / "path.sh").write_text(PATH.format(made=MADE, root=checkout), encoding="utf-8")
    if not (folder / "cmd.sh").exists():
        shutil.copy(template / "cmd.sh", folder / "cmd.sh")
    _link_all(folder / "conf", [*(template / "conf").iterdir(), *(recipe / "conf").iterdir()])
    _link_all(folder / "local", sorted((recipe / "local").iterdir()))
    (folder / "local" / "path.sh").touch()
    run.write_text(run_script(script.read_text(encoding="utf-8")), encoding="utf-8")
    run.chmod(0o755)
    return folder


def run_script(script: str) -> str:
    """The plugin recipe's run.sh for ESPnet's asr.sh, which takes one decoding configuration at a time."""
    script = ENGINE.sub(lambda _: f"./asr.sh {OPTIONS}", script)
    script = re.sub(r'--inference_config "(\S+)[^"]*"', r"--inference_config \1", script)
    first, rest = script.split("\n", 1)
    return f"{first}\n{MADE}: the recipe's options, ESPnet's own asr.sh.\n{rest}"


def _link_all(folder: Path, targets: Sequence[Path]) -> None:
    folder.mkdir(exist_ok=True)
    for target in targets:
        _symlink(folder / target.name, target.resolve())


def _symlink(path: Path, target: Path) -> None:
    if path.is_symlink():
        path.unlink()
    if not path.exists():
        os.symlink(target, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of an ESPnet checkout")
    parser.add_argument("recipe", type=Path, help="recipe of the plugin, such as egs/mini_an4/asr1")
    parser.add_argument("--here", type=Path, help="folder to make, outside of the checkout")
    args = parser.parse_args()
    try:
        print(link(args.checkout, args.recipe, args.here))
    except OSError as error:
        sys.exit(f"checkout: {error}")


if __name__ == "__main__":
    main()
