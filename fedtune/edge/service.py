"""The trainer process without torch; see `fedtune.process.trainer`.

python -m fedtune.edge.service CONFIG.json
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
    from fedtune.edge.device import open_device

    kept = Path(config.kept) if config.kept else None
    return lambda: open_device(
        open_bundle(Path(config.bundle)),
        Path(config.data),
        Path(config.graphs),
        config.threads,
        config.memory_mb,
        kept,
    )


if __name__ == "__main__":
    run(sys.argv[1:], ready)
