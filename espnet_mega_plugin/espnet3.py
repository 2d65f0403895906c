"""ESPnet3 by name: the dotted paths that its configurations take, with `decoder: mega` attached.

    task: espnet_mega_plugin.espnet3.ASRTransducerTask              # conf/training*.yaml

    model:                                                          # conf/inference*.yaml
      _target_: espnet_mega_plugin.espnet3.Speech2Text

ESPnet3 imports these names in every process that builds a model: the one that trains, and each worker that collects
statistics or decodes. Without the plugin that import fails, where ESPnet's own names would build ESPnet's own class.
Classes are ESPnet's.
"""

from espnet_mega_plugin.attach import register

register()

from espnet2.bin.asr_transducer_inference import Speech2Text  # noqa: E402 - the choice of decoders comes first
from espnet3.systems.esp2_asr.src.transducer_task import ASRTransducerTask  # noqa: E402

__all__ = ["ASRTransducerTask", "Speech2Text"]
