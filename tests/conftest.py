"""Seeds that are printed, one thread for small tensors, deterministic torch."""

import os
import random
import signal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "laws", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("laws")
torch.set_num_threads(1)
# A shell's background job ignores Ctrl-C and hands that on; tests of an interruption send it to this process and others
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Seeds every test; ESPNET_MEGA_TEST_SEED=N repeats the run that printed N."""
    value = int(os.environ.get("ESPNET_MEGA_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"ESPNET_MEGA_TEST_SEED={value}")
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - ESPnet draws from the global generator
    torch.manual_seed(value)
    return value


def pytest_collection_modifyitems(items) -> None:
    without_gpu = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(without_gpu)
