"""Two spawned processes train ESPnet's task by ESPnet's own worker: the plugin's class, and one process's step, with
every loss and with gradients gathered over two batches. The command line and the launcher: recipe/test_recipe_run.py."""

import multiprocessing
import os
import random
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

LEARNING_RATE = 0.5
CONFIG = {
    "token_list": ["<blank>", "a", "b", "c", "<sos/eos>"],
    "input_size": 16,
    "use_preprocessor": False,
    "normalize": None,
    "encoder_conf": {
        "input_conf": {"subsampling_factor": 4, "conv_size": 8},
        "body_conf": [
            # not conformer: its batch normalisation makes a step depend on how the batch is dealt out
            {"block_type": "branchformer", "hidden_size": 8, "linear_size": 16, "heads": 2, "conv_mod_kernel_size": 3}
        ],
    },
    "decoder": "mega",
    "decoder_conf": {"block_size": 8, "linear_size": 16, "qk_size": 4, "v_size": 8, "num_heads": 2, "num_blocks": 2},
    "joint_network_conf": {"joint_space_size": 8},
    "batch_type": "unsorted",
    "batch_size": 4,
    "valid_batch_size": 4,
    "num_workers": 0,
    "max_epoch": 1,
    "optim": "sgd",
    "optim_conf": {"lr": LEARNING_RATE},
    "grad_clip": 1e9,
    "use_tensorboard": False,
    "use_matplotlib": False,
    "best_model_criterion": [["valid", "loss", "min"]],
    "keep_nbest_models": 1,
    "dist_backend": "gloo",
    "multiprocessing_distributed": False,
}

VARIANTS = {
    "fused": {"model_conf": {"transducer_loss": "fused"}},
    "standard": {"model_conf": {"transducer_loss": "standard"}},
    "pruned": {"model_conf": {"transducer_loss": "pruned"}},
    "amp": {"use_amp": True, "model_conf": {"transducer_loss": "fused"}},
    "accumulated": {"batch_size": 2, "accum_grad": 2, "model_conf": {"transducer_loss": "fused"}},
}


def write_data(folder: Path, seed: int) -> dict:
    """Four utterances of equal length (no convolution sees padding) with one to four labels; as options for ESPnet."""
    draw = np.random.default_rng(seed)
    with open(folder / "feats.scp", "w") as feats, open(folder / "text", "w") as text:
        for number in range(1, 5):
            np.save(folder / f"{number}.npy", draw.standard_normal((60, 16)).astype(np.float32))
            feats.write(f"utt{number} {folder / f'{number}.npy'}\n")
            text.write(f"utt{number} {' '.join(map(str, draw.integers(1, 4, size=number)))}\n")
    files = [f"{folder / 'feats.scp'},speech,npy", f"{folder / 'text'},text,text_int"]
    return {
        **{f"{part}_data_path_and_name_and_type": [file.split(",") for file in files] for part in ("train", "valid")},
        **{f"{part}_shape_file": [str(folder / "feats.scp")] for part in ("train", "valid")},
    }


def train(config: Path, rank: int, world: int, result: Path) -> None:
    """One process of a training of one step; writes the decoder's class and all parameters before and after."""
    from espnet2.tasks.asr_transducer import ASRTransducerTask
    from espnet2.train.distributed_utils import resolve_distributed_mode

    models = []

    class Task(ASRTransducerTask):
        @classmethod
        def build_model(cls, args):
            models.append(super().build_model(args))
            models.append({name: value.detach().clone() for name, value in models[0].named_parameters()})
            return models[0]

    arguments = ["--config", str(config), "--ngpu", "0", "--output_dir", str(result.with_suffix(""))]
    if world > 1:
        arguments += ["--dist_world_size", str(world), "--dist_rank", str(rank)]
        arguments += ["--dist_init_method", f"file://{config.with_suffix('.rendezvous')}"]
    args = Task.get_parser().parse_args(arguments)
    args.version = ""
    resolve_distributed_mode(args)
    assert args.distributed == (world > 1)
    Task.main_worker(args)
    model, before = models
    after = {name: value.detach() for name, value in model.named_parameters()}
    kind = f"{type(model.decoder).__module__}.{type(model.decoder).__qualname__}"
    torch.save({"decoder": kind, "before": before, "after": after}, result)


@contextmanager
def bfloat16_on_cpu():
    """ESPnet's trainer asks for CUDA's autocast under --use_amp; the CPU's answers."""
    from espnet2.train import trainer

    cuda = trainer.autocast
    trainer.autocast = lambda *args, **kwargs: torch.autocast("cpu", dtype=torch.bfloat16)
    try:
        yield
    finally:
        trainer.autocast = cuda


def train_variants(folder: Path, rank: int, world: int) -> None:
    """All variants one after the other in this process; results in `<variant>.<rank>of<world>.pt`."""
    for name, changes in VARIANTS.items():
        with bfloat16_on_cpu() if changes.get("use_amp") else nullcontext():
            train(folder / f"{name}.yaml", rank, world, folder / f"{name}.{rank}of{world}.pt")
        if world > 1:
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the results of two processes and of one, for every variant."""
    folder = tmp_path_factory.mktemp("ddp")
    seed = int(os.environ.get("ESPNET_MEGA_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"ESPNET_MEGA_TEST_SEED={seed}")
    data = write_data(folder, seed)
    for name, changes in VARIANTS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**CONFIG, **data, **changes}))
    spawn = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        workers = [spawn.Process(target=train_variants, args=(folder, rank, 2)) for rank in (0, 1)]
        for worker in workers:
            worker.start()
        train_variants(folder, 0, 1)
        for worker in workers:
            worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "reference"),
    [
        ("fused", "fused"),
        ("standard", "standard"),
        ("pruned", "pruned"),
        ("accumulated", "fused"),
        ("fused", "standard"),
    ],
)
def test_a_step_in_two_spawned_processes_is_the_step_of_one(trained, variant, reference):
    names = (f"{reference}.0of1", f"{variant}.0of2", f"{variant}.1of2")
    alone, first, second = (torch.load(trained / f"{name}.pt") for name in names)
    assert {run["decoder"] for run in (alone, first, second)} == {"espnet_mega_plugin.decoder.MEGADecoder"}
    for run in (first, second):
        torch.testing.assert_close(run["before"], alone["before"], rtol=0, atol=0)
    torch.testing.assert_close(first["after"], second["after"], rtol=0, atol=0)
    torch.testing.assert_close(gradient(first), gradient(alone), rtol=1e-4, atol=1e-5)
    assert gradient(alone)["decoder.embed.weight"].abs().max() > 1e-3


@pytest.mark.slow
def test_automatic_mixed_precision_in_two_processes(trained):
    """Far from the float32 step only by what bfloat16 rounds, some 2 ** -8 of each number; not the same to the bit."""
    alone, first, second = (torch.load(trained / f"{name}.pt") for name in ("fused.0of1", "amp.0of2", "amp.1of2"))
    torch.testing.assert_close(first["after"], second["after"], rtol=0, atol=0)
    exact, rounded = (torch.cat([g.flatten() for g in gradient(run).values()]) for run in (alone, first))
    assert 1e-5 < (rounded - exact).norm() / exact.norm() < 0.03


def gradient(run: dict) -> dict:
    """SGD without momentum: the step is the gradient times the rate."""
    return {name: (run["before"][name] - run["after"][name]) / LEARNING_RATE for name in run["before"]}
