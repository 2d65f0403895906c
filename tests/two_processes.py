"""Runs a piece of work in two spawned processes that form a gloo group over a file."""

import gc

import torch


def _one(rank, rendezvous, work, args):
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        work(rank, *args)
        # A group that ends while its peer still works, or while a DDP module still holds it, aborts the process:
        # 3 runs in 12 on torch 2.12.1 (std::terminate in the teardown), none with these two lines.
        torch.distributed.barrier()
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()


def in_two_processes(folder, work, *args) -> None:
    """Calls ``work(rank, *args)``, a function of a module, in both; raises what one of them raises."""
    torch.multiprocessing.spawn(_one, (folder / "rendezvous", work, args), nprocs=2)
