"""One call at the top of every notebook: `setup(seed)`."""

import numpy as np
import torch

from common.foundation.device import seed_everything
from common.foundation.plots import use_style


def setup(seed: int = 0) -> None:
    """Make a notebook give the same output everywhere: seeds, one thread, deterministic algorithms, four digits.

    One thread because sums over threads round differently; four digits because that is what agrees across processors.
    """
    seed_everything(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.set_printoptions(precision=4, sci_mode=False)
    np.set_printoptions(precision=4, suppress=True)
    use_style()
    print(f"seed {seed}, 1 thread, deterministic")
