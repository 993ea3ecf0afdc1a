"""fedtune client on a device that falls silent in secure sums, once its shares are
with the others: for tests.

    python -m leaving_device ROUNDS LAST SECONDS VECTORS ARGUMENTS OF `fedtune client`

In each of ROUNDS ("2,3") it answers the question for its masked vector only after so many seconds; in
round LAST (0: none) the question kills the process. Of every round it writes the vector as it is without
masks to the folder VECTORS.
"""

import os
import signal
import sys
import time
from pathlib import Path

from fedtune.cli.main import main
from fedtune.client.secure import SecureWork
from fedtune.secagg.messages import Kind, kind_of


def leaving(rounds: set[int], last: int, seconds: float, vectors: Path) -> None:
    """Changes `SecureWork` in this process."""
    answer = SecureWork.answer

    def changed(self: SecureWork, question: bytes) -> bytes:
        if kind_of(question) == Kind.INBOX:
            assert self._vector is not None
            (vectors / str(self._last())).write_bytes(self._vector.tobytes())
            if self._last() == last:
                os.kill(os.getpid(), signal.SIGKILL)
            if self._last() in rounds:
                time.sleep(seconds)
        return answer(self, question)

    SecureWork.answer = changed  # type: ignore[method-assign]


if __name__ == "__main__":
    leaving(
        {int(r) for r in sys.argv[1].split(",") if r}, int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
    )
    sys.argv[1:5] = []
    main()
