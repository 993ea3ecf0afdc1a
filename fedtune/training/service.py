"""The trainer process with torch; see `fedtune.process.trainer`.

python -m fedtune.training.service CONFIG.json
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.bundles.bundle import open_bundle
from fedtune.process.trainer import Config, run

if TYPE_CHECKING:
    from fedtune.training.holder import Device


def ready(config: Config) -> "Callable[[], Device]":
    import torch

    from fedtune.training.device import open_device

    if config.threads:
        torch.set_num_threads(config.threads)
    kept = Path(config.kept) if config.kept else None
    return lambda: open_device(
        open_bundle(Path(config.bundle)), Path(config.data), Path(config.base) if config.base else None, kept
    )


if __name__ == "__main__":
    run(sys.argv[1:], ready)
