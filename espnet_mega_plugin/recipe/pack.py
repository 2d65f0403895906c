"""Stage 14: ESPnet's pack of a model, made so that nobody runs it as another model.

`espnet2.bin.pack` writes the zip that `Speech2Text.from_pretrained` and `espnet2.main_funcs.pack_funcs.unpack` read.
Its config.yaml says `decoder: mega`, and an ESPnet without the plugin would build its own class of that name and decode
with it in silence. So a pack of a MEGA model also gets

- in `decoder_conf`, every argument that only the plugin's class has, at the value the model was trained with: another
  class stops with `TypeError: ... got an unexpected keyword argument`;
- in config.yaml and meta.yaml the entry `requires`, and a README.md that says what to install.
"""

import argparse
import inspect
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from espnet_mega_plugin import __version__

PLUGIN = "espnet-mega-plugin"
OURS = ("mega", "mega_espnet")  # decoders by names that need the plugin

README = """\
# {name}

{needs}A model of [ESPnet](https://pypi.org/project/espnet/)'s task `asr_transducer`, packed by ESPnet's own command.

```python
import soundfile
from espnet2.bin.asr_transducer_inference import Speech2Text
from espnet2.main_funcs.pack_funcs import unpack

speech2text = Speech2Text(**unpack("{archive}", "{name}"))    # or, with espnet_model_zoo installed:
# speech2text = Speech2Text.from_pretrained("{archive}")
speech, rate = soundfile.read("speech.wav")                   # {rate}, one channel
text, *_ = speech2text.hypotheses_to_results(speech2text(speech))[0]
```

{made}
"""
NEEDS = """\
**This model needs the package `{plugin}` {version} or later**, installed beside ESPnet: its `decoder: {decoder}` is the
plugin's. It is attached by installation, without a line of code (`python -m espnet_mega_plugin doctor` tells).
An ESPnet without it stops with `TypeError: ... unexpected keyword argument`.

"""


def own_arguments() -> dict:
    """The arguments that the plugin's MEGADecoder has and ESPnet's has not, with their defaults."""
    from espnet2.asr_transducer.decoder.mega_decoder import MEGADecoder as Theirs

    from espnet_mega_plugin.decoder import MEGADecoder

    ours, theirs = (inspect.signature(decoder).parameters for decoder in (MEGADecoder, Theirs))
    return {name: parameter.default for name, parameter in ours.items() if name not in theirs}


def needs_plugin(config: Mapping) -> bool:
    return str(config.get("decoder", "")).lower() in OURS


def marked(config: Mapping, own: Mapping, archived: Sequence[str], here: Path) -> dict:
    """A training's configuration as it is packed.

    own: see `own_arguments`. archived: names of the packed files, relative to `here`; where the configuration names one
    by its absolute path, it gets the relative one, which `unpack` replaces by the place it unpacks to.
    """
    absolute = {str(here / name): name for name in archived}
    packed = _replaced(dict(config), absolute)
    if needs_plugin(config):
        packed["requires"] = {PLUGIN: f">={__version__}"}
    if str(config.get("decoder", "")).lower() == "mega":
        packed["decoder_conf"] = {**own, **(packed.get("decoder_conf") or {})}
    return packed


def _replaced(value, new: Mapping[str, str]):
    if isinstance(value, Mapping):
        return {key: _replaced(inner, new) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, new) for inner in value]
    return new.get(value, value) if isinstance(value, str) else value


def elsewhere(words: Sequence[str], here: Path) -> dict[str, str]:
    """Paths outside of the recipe that a command reaches by a symbolic link or an absolute name: resolved -> as given.

    ESPnet packs them under their resolved names, absolute ones in meta.yaml: they would not be found after unpacking.
    """
    found = {}
    for word in words:
        resolved = Path(word).resolve()
        if resolved.exists() and not resolved.is_relative_to(here.resolve()):
            found[str(resolved)] = word if not Path(word).is_absolute() else f"packed/{resolved.name}"
    return found


def sign(archive: Path, target: Path, own: Mapping, here: Path, renamed: Mapping[str, str] | None = None) -> None:
    """Write `target`, the pack `archive` with its configuration marked and a README.md.

    renamed: see `elsewhere`.
    """
    renamed = renamed or {}

    def name_of(path: str) -> str:
        for resolved, given in renamed.items():
            if Path("/", path).is_relative_to(resolved):
                return str(given / Path("/", path).relative_to(resolved))
        return path

    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        names = {entry: name_of(entry) for entry in old.namelist()}
        meta = yaml.safe_load(old.read("meta.yaml"))
        packed_config = meta["yaml_files"]["asr_train_config"].lstrip("/")
        for group in ("files", "yaml_files"):
            meta[group] = {key: name_of(path) for key, path in (meta.get(group) or {}).items()}
        config = _replaced(yaml.safe_load(old.read(packed_config)), renamed)
        if needs_plugin(config):
            meta["requires"] = {PLUGIN: f">={__version__}"}
        config = marked(config, own, list(names.values()), here)
        changed = {
            "meta.yaml": yaml.safe_dump(meta),
            names[packed_config]: yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
            "README.md": readme(config, meta, target),
        }
        for entry, name in names.items():
            if name not in changed:
                with old.open(entry) as source, new.open(name, "w", force_zip64=True) as copy:
                    while block := source.read(1 << 20):
                        copy.write(block)
        for name, text in changed.items():
            new.writestr(name, text)


def readme(config: Mapping, meta: Mapping, archive: Path) -> str:
    rate = (config.get("frontend_conf") or {}).get("fs", "16k")
    needs = NEEDS.format(plugin=PLUGIN, version=__version__, decoder=config["decoder"]) if needs_plugin(config) else ""
    made = f"Made with ESPnet {meta.get('espnet')}, torch {meta.get('torch')}, {PLUGIN} {__version__}."
    return README.format(name=archive.stem, archive=archive.name, needs=needs, rate=rate, made=made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outpath", type=Path, required=True)
    parser.add_argument("--if_there", type=Path, action="append", default=[], help="packed where it exists")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- ESPnet's pack command, without --outpath")
    args = parser.parse_args()
    plain = args.outpath.with_name(f"{args.outpath.stem}.plain.zip")  # the ending tells ESPnet the kind of archive
    new = args.outpath.with_name(f"{args.outpath.stem}.new.zip")
    found = [path for path in args.if_there if path.exists() and (path.is_file() or any(path.iterdir()))]
    options = [word for path in found for word in ("--option", str(path))]
    command = [*args.command[1:], *options, "--outpath", str(plain)]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"pack: exit status {result.returncode}: {shlex.join(command)}\n{result.stderr[-2000:]}")
        sign(plain, new, own_arguments(), Path.cwd(), elsewhere(command, Path.cwd()))
        new.replace(args.outpath)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"pack: {error!r}")
    finally:
        plain.unlink(missing_ok=True)
        new.unlink(missing_ok=True)
    print(f"{args.outpath}: {args.outpath.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
