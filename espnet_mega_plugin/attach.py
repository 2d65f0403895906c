"""DOOR 1: everything that touches ESPnet's registries.

ESPnet has no plugin mechanism, so the package attaches to three imports, and to nothing before they happen:

- `espnet2.train.class_choices`: a transducer task that then writes down its choice of decoders gets the plugin's class
  as `mega` and keeps ESPnet's as `mega_espnet`; the model it builds becomes the plugin's subclass of ESPnet's, and
  ESPnet's trainer draws what MEGA attends to where `--num_att_plot` asks for it. That module is the place because
  ESPnet imports it after torch; the task module itself is already half imported when torch calls `install`, too late
  for an import hook.
- `espnet2.asr_transducer.beam_search_transducer`: its BeamSearchTransducer, asked for a search type such as
  `maes_batched`, becomes the plugin's subclass of it (`espnet_search.py`); all other types stay ESPnet's.
- `warprnnt_pytorch`, which ESPnet's models import for their loss: answered with the plugin's loss where no real one is
  installed.

Three ways lead here. *Automatic*: torch calls `install` at the end of its own import (entry point `torch.backends` in
setup.cfg). That group is meant for devices; it is used because it reaches every process that trains or decodes,
spawned workers included, without a line of code in any of them. *Explicit*: `python -m espnet_mega_plugin.run`.
*By hand*: `register()`.

Importing this module loads neither torch nor ESPnet.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
import threading

SWITCH = "ESPNET_MEGA_PLUGIN"  # "0": nothing here happens
LOSS_SWITCH = "ESPNET_MEGA_PLUGIN_LOSS"  # "plugin": our loss even where a real warprnnt_pytorch is installed

CLASS_CHOICES = "espnet2.train.class_choices"
TASKS = ("espnet2.tasks.asr_transducer", "espnet3.systems.esp2_asr.src.transducer_task")
ABS_DECODER = ("espnet2.asr_transducer.decoder.abs_decoder", "AbsDecoder")
MODEL = "ESPnetASRTransducerModel"
SEARCH, SEARCH_CLASS = "espnet2.asr_transducer.beam_search_transducer", "BeamSearchTransducer"
BATCHED = ("greedy_batched", "maes_batched", "tsd_batched", "alsd_batched")
TRAINER = "espnet2.train.trainer"
WARPRNNT = "warprnnt_pytorch"
PLUGIN_LOSS = "espnet_mega_plugin.rnnt.warprnnt"

_log = logging.getLogger("espnet_mega_plugin")
_lock = threading.Lock()
_announced: set[str] = set()  # what the log was told of


def is_off() -> bool:
    """Whether ESPNET_MEGA_PLUGIN=0 turns the plugin off."""
    return os.environ.get(SWITCH, "").strip().lower() in ("0", "false", "no", "off")


def loss_is_forced() -> bool:
    """Whether ESPNET_MEGA_PLUGIN_LOSS=plugin puts the plugin's loss before an installed warprnnt_pytorch.

    Raises:
        ValueError: the variable holds something else than `auto` (the default) or `plugin`.
    """
    value = os.environ.get(LOSS_SWITCH, "").strip().lower()
    if value not in ("", "auto", "plugin"):
        raise ValueError(
            f"{LOSS_SWITCH}={value!r}: expected 'auto' (a real {WARPRNNT} where one is installed, else the plugin's "
            "loss; the default) or 'plugin' (always the plugin's loss)."
        )
    return value == "plugin"


def install() -> None:
    """Attaches the plugin; torch calls it at the end of its import. Never raises: a failure becomes a log record."""
    try:
        attach()
    except Exception as error:
        _log.warning("espnet_mega_plugin is not (wholly) attached: %s: %s", type(error).__name__, error)


def attach() -> None:
    """Attaches the plugin to the imports of this process; what is imported already is patched in place.

    May be called any number of times, from any thread. Does nothing where ESPNET_MEGA_PLUGIN=0.

    Raises:
        ValueError: ESPNET_MEGA_PLUGIN_LOSS holds an unknown value (the decoder is attached all the same).
        ImportError, TypeError: ESPnet's task is imported already and the plugin's decoder does not fit into it.
    """
    if is_off():
        return
    with _lock:  # no import may happen under it: another thread may hold that module's lock and wait for this one
        _on_meta_path(_PatchingFinder, 0)
        _on_meta_path(_ForcedLossFinder, 0)
        _on_meta_path(_LossFinder)
        if CLASS_CHOICES in sys.modules:
            _wrap(sys.modules[CLASS_CHOICES].ClassChoices)
        _put_search()
    for task in filter(None, map(sys.modules.get, TASKS)):
        if hasattr(task, "decoder_choices"):  # a task in the middle of its import fills its choice through the wrap
            _fill(task.decoder_choices)
            _put_model()
            _put_pictures()
    loss_is_forced()  # only its check; import asks again


def register() -> None:
    """Makes `decoder: mega` the plugin's class in ESPnet's transducer task, now; for notebooks and own programs.

    Needed only where the automatic way is not at work. It imports ESPnet's task, so call it at the top level of a
    module that spawned workers import too, not under `if __name__ == "__main__"`. May be called again. An ESPnet3 task
    is patched where it is imported already, otherwise when it is imported. With ESPNET_MEGA_PLUGIN=0 it changes
    nothing and logs a warning.

    Raises:
        ImportError: ESPnet or something it needs is not installed; the message says what to install.
        TypeError: the plugin's decoder is no subclass of this ESPnet's AbsDecoder.
        RuntimeError: this ESPnet's transducer task has no choice of decoders that the plugin knows.
    """
    if is_off():
        _log.warning("%s=0 turns the plugin off: register() leaves `decoder: mega` to ESPnet.", SWITCH)
        return
    try:
        task = importlib.import_module(TASKS[0])
    except ModuleNotFoundError as error:
        raise ImportError(_what_to_install(error)) from error
    attach()
    choices = getattr(task, "decoder_choices", None)
    if choices is None or "mega_espnet" not in choices.classes:
        raise RuntimeError(
            f"{TASKS[0]} of ESPnet {version_of('espnet')} holds no `decoder_choices` for {'.'.join(ABS_DECODER)}; "
            "the plugin knows ESPnet 202511 and 202611: install one of these."
        )


def loss_in_use() -> str | None:
    """The module or file that `import warprnnt_pytorch` gives in this process; None where there is none."""
    module = sys.modules.get(WARPRNNT)
    if module is not None:
        return getattr(module.__spec__, "origin", None) or getattr(module, "__file__", None) or repr(module)
    spec = importlib.util.find_spec(WARPRNNT)
    if spec is None:
        return None
    return spec.origin or f"a folder without __init__.py: {list(spec.submodule_search_locations or ())}"


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


# --- the choice of decoders ------------------------------------------------------------------------------------------


def _is_transducer_decoder(choices) -> bool:
    """True for the decoders of ESPnet2's and ESPnet3's transducer task and of any copy of it; not for other tasks'."""
    base = choices.base_type
    return choices.name == "decoder" and base is not None and (base.__module__, base.__name__) == ABS_DECODER


def _fill(choices) -> None:
    """Puts the plugin's class into a transducer's choice of decoders; any other choice is left as it is."""
    if not _is_transducer_decoder(choices) or "mega_espnet" in choices.classes:
        return
    from espnet_mega_plugin.decoder import MEGADecoder

    if not issubclass(MEGADecoder, choices.base_type):
        raise TypeError(f"{MEGADecoder} is no subclass of {choices.base_type}: two ESPnets are mixed in this process.")
    theirs = choices.classes.get("mega", MEGADecoder)
    choices.classes["mega"] = MEGADecoder
    choices.classes["mega_espnet"] = theirs  # last: its presence says that the choice is filled


def _put_model() -> None:
    """Puts the plugin's model class where ESPnet's task builds its own; the task imported that before its choices."""
    from espnet_mega_plugin.model import MegaTransducerModel

    for task in filter(None, map(sys.modules.get, TASKS)):
        if hasattr(task, MODEL):
            setattr(task, MODEL, MegaTransducerModel)


def _put_pictures() -> None:
    """Lets ESPnet's `--num_att_plot` draw a MEGA decoder; the tasks import that trainer before their choices."""
    from espnet_mega_plugin.pictures.trainer import add_pictures

    trainer = getattr(sys.modules.get(TRAINER), "Trainer", None)
    if trainer is not None:
        add_pictures(trainer)


def _wrap(class_choices: type) -> None:
    """Makes every later ClassChoices fill itself, and makes it say which decoder it gave."""
    if getattr(class_choices.__init__, "_espnet_mega_plugin", False):
        return
    init, get_class = class_choices.__init__, class_choices.get_class

    @functools.wraps(init)
    def filling_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        try:
            _fill(self)
            if _is_transducer_decoder(self):
                _put_search()  # where it was its import that first imported torch
                _put_model()
                _put_pictures()
        except Exception as error:  # `decoder: rnn` shall go on; whoever asks for mega is told in get_class
            self._mega_failure = error
            _log.warning("espnet_mega_plugin's decoder does not fit here: %s: %s", type(error).__name__, error)

    @functools.wraps(get_class)
    def announcing_get_class(self, name, *args, **kwargs):
        chosen = get_class(self, name, *args, **kwargs)
        if _is_transducer_decoder(self):
            failure = getattr(self, "_mega_failure", None)
            if failure is not None and name.lower() == "mega":
                raise ImportError(
                    f"`decoder: mega` is the plugin's, and its class does not load ({failure!r}). Run `python -m "
                    f"espnet_mega_plugin doctor`; {SWITCH}=0 gives ESPnet's own class instead."
                ) from failure
            _announce(f"decoder {name!r} is {chosen.__module__}.{chosen.__qualname__}, ")
        return chosen

    filling_init._espnet_mega_plugin = True
    class_choices.__init__, class_choices.get_class = filling_init, announcing_get_class


def _announce(decoder: str = "") -> None:
    """One INFO line for each decoder in a process, or one for the loss where there is none.

    ESPnet configures logging in its main, so it waits until INFO is switched on. There may be two decoders: ESPnet3
    and `--print_config` ask for the default one (rnn) to show its arguments, before the one of the configuration.
    """
    if decoder in _announced or (_announced and not decoder) or not _log.isEnabledFor(logging.INFO):
        return
    _announced.add(decoder)
    from espnet_mega_plugin import __version__

    versions = f"ESPnet {version_of('espnet')}, torch {version_of('torch')}"
    _log.info("espnet_mega_plugin %s: %s%s is %s; %s", __version__, decoder, WARPRNNT, loss_in_use(), versions)


# --- the search ------------------------------------------------------------------------------------------------------


def _put_search() -> None:
    """Makes ESPnet's BeamSearchTransducer know the batched search types, where it is imported already."""
    search = getattr(sys.modules.get(SEARCH), SEARCH_CLASS, None)
    if search is not None and "__new__" not in vars(search):
        search.__new__ = _new_search(search)


def _new_search(search: type):
    place = ("decoder", "joint_network", "beam_size", "lm", "lm_weight", "search_type").index("search_type")

    def __new__(cls, *args, **kwargs):
        search_type = kwargs.get("search_type", args[place] if len(args) > place else None)
        if cls is not search or search_type not in BATCHED:
            return object.__new__(cls)
        ours = importlib.import_module("espnet_mega_plugin.espnet_search")
        kind = ours.BatchedBeamSearch
        if not issubclass(kind, cls):  # ESPnet's module was reloaded: there are two BeamSearchTransducers
            kind = type(kind.__name__, (kind, cls), {})
        return object.__new__(kind)  # Python calls its __init__ next

    return __new__


# --- import hooks ----------------------------------------------------------------------------------------------------


def _on_meta_path(kind: type, place: int | None = None) -> None:
    """Puts a finder of this kind on sys.meta_path, at the end unless a place is named; one is enough."""
    if not any(type(finder) is kind for finder in sys.meta_path):
        sys.meta_path.insert(len(sys.meta_path) if place is None else place, kind())


class _PatchingFinder(threading.local):
    """Lets the other finders find a module of ESPnet's and patches it when it has been executed."""

    patches = {CLASS_CHOICES: lambda module: _wrap(module.ClassChoices), SEARCH: lambda module: _put_search()}
    busy = frozenset()  # names; a finder of the same kind, of another package, may ask us in turn (per thread)

    def find_spec(self, name, path=None, target=None):
        if name not in self.patches or name in self.busy:
            return None
        self.busy |= {name}
        try:
            others = (f for f in list(sys.meta_path) if f is not self and hasattr(f, "find_spec"))
            spec = next(filter(None, (f.find_spec(name, path, target) for f in others)), None)
        finally:
            self.busy -= {name}
        if spec is not None and spec.loader is not None:
            _after_execution(spec.loader, name, self.patches[name])
        return spec


def _after_execution(loader, name, patch) -> None:
    """Shadows the loader's exec_module once: the loader stays ESPnet's own, so reload and inspect see no difference."""
    execute = loader.exec_module

    def exec_module(module):
        execute(module)
        if module.__name__ != name:
            return  # a loader of a zip archive serves other modules as well
        vars(loader).pop("exec_module", None)
        try:
            patch(module)
        except Exception as error:  # ESPnet's import must not fail by it
            _log.warning("espnet_mega_plugin is not attached to %s, which stays as ESPnet has it: %r", name, error)

    loader.exec_module = exec_module


class _LossFinder:
    """Answers `import warprnnt_pytorch`; it stands last on sys.meta_path, so a real installation wins."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, origin=PLUGIN_LOSS) if name == WARPRNNT else None

    def create_module(self, spec):
        return None  # an ordinary new module

    def exec_module(self, module):
        ours = importlib.import_module(PLUGIN_LOSS)
        module.__doc__ = ours.__doc__
        module.RNNTLoss, module.rnnt_loss = ours.RNNTLoss, ours.rnnt_loss
        _announce()


class _ForcedLossFinder(_LossFinder):
    """Stands first, and answers where ESPNET_MEGA_PLUGIN_LOSS=plugin."""

    def find_spec(self, name, path=None, target=None):
        return super().find_spec(name) if name == WARPRNNT and loss_is_forced() else None


def _what_to_install(error: ModuleNotFoundError) -> str:
    """What pip has to install for the module that ESPnet's task did not find."""
    missing = (error.name or "").partition(".")[0]
    if missing in ("espnet2", "espnet"):
        line = "202511" if sys.version_info < (3, 12) else "202611"
        return f"ESPnet is not installed: `pip install espnet=={line}`."
    package = {"distutils": "setuptools", "yaml": "pyyaml"}.get(missing, missing)
    return f"ESPnet's transducer task needs the module {missing!r}, which is not installed: `pip install {package}`."
