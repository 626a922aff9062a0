"""A process that labels the shards of a plan on one device as its parent gives them; see `devices`.

Its first line of input is its task. It writes {"claim"} for another shard, which comes as {"shard": N or null}; events
of the job; and at last {"done"} or {"failure"}. It stops, with what is finished on disk, when it reads {"stop"} or its
input ends: whoever kills the parent stops the children.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import IO, Any

from spear_fast.labelling.errors import Interrupted, LabellingError, reason_of


class _Parent:
    """The other end of standard input and output."""

    def __init__(self, stream: IO[str], answers: IO[str]) -> None:
        self.stop = threading.Event()
        self._stream, self._input = stream, answers
        self._lock = threading.Lock()
        self._shards: queue.Queue[int | None] = queue.Queue()
        self.task: dict[str, Any] = json.loads(answers.readline())
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._input:
            message = json.loads(line)
            if "shard" in message:
                self._shards.put(message["shard"])
            if "stop" in message:
                break
        self.stop.set()
        self._shards.put(None)

    def tell(self, **message: Any) -> None:
        with self._lock:
            print(json.dumps(message), file=self._stream, flush=True)

    def claim(self) -> int | None:
        """Returns the number of a shard, None when there are no more."""
        if self.stop.is_set():
            return None
        self.tell(claim=True)
        return self._shards.get()

    def __call__(self, event: str, **fields: Any) -> None:
        self.tell(event=event, fields=fields)

    def close(self) -> None:
        return None


def main() -> int:
    """Labels, and returns the exit status."""
    # whatever libraries print goes to standard error
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    parent = _Parent(stream, sys.stdin)
    task = parent.task
    try:
        import torch

        from spear_fast.checkpoints.load import load_model
        from spear_fast.labelling.parts import label_claimed

        torch.set_num_threads(task["threads"])
        label_claimed(
            task["out"],
            load_model(task["model"]),
            parent.claim,
            device=task["device"],
            report=parent,
            stop=parent.stop,
            workers=task["workers"],
            lock=task["lock"],
        )
    except Interrupted:
        pass
    except Exception as error:
        # what the user must mend is the same for all; anything else may be this device's alone
        parent.tell(failure=reason_of(error), of_all=isinstance(error, LabellingError))
        return 1
    parent.tell(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
