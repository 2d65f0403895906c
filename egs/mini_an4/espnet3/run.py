"""mini_an4 with a MEGA transducer in ESPnet3 (ESPnet 202611 or later). In this folder, half a minute on two cores:

    python run.py --stages create_dataset train_tokenizer collect_stats train infer measure \
        --training_config conf/training.yaml --inference_config conf/inference.yaml --metrics_config conf/metrics.yaml

Stages may be run alone and again; a training that was interrupted goes on. Error rates come into
exp/training/inference/metrics.json. ESPnet3 needs more than ESPnet:

    pip install "espnet-mega-plugin[espnet3]"
"""

from espnet3.systems.esp2_asr.system import ASRSystem
from espnet3.systems.launch import launch

if __name__ == "__main__":  # worker processes import this file again
    launch(ASRSystem)
