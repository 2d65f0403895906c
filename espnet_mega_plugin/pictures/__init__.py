"""Pictures of a MEGA decoder: what its attention looks at, and how far its moving averages reach.

    weights.py   the numbers, from the network
    figures.py   the figures, and where they go: a file, TensorBoard, wandb
    trainer.py   while ESPnet trains: `--num_att_plot N` draws N validation utterances in every epoch
    callback.py  the same for Lightning, ESPnet3's trainer
    command.py   without training: `python -m espnet_mega_plugin pictures --asr_exp exp/asr_...`

The files stand where ESPnet puts its own: `<exp>/att_ws/<utterance>/decoder.attention.<epoch>ep.png` and, one an epoch,
`<exp>/att_ws/decoder.ema_kernels.<epoch>ep.png`.
"""
