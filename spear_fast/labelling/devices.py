"""Several devices of one machine: a process for each, which labels shards as this one gives them.

The processes say what happens on their standard output, a line of JSON each, and are told on their standard input; see
`device_worker`. One that dies gives its shards back to the others.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch

from spear_fast.labelling.errors import Interrupted, LabellingError
from spear_fast.labelling.files import FolderLock
from spear_fast.labelling.job import announce, pending_shards, progress, summarize
from spear_fast.labelling.parts import PartStore, part_store
from spear_fast.labelling.planning import JobPlan, read_plan
from spear_fast.labelling.progress import Reporter, Silent, Summary
from spear_fast.labelling.sharing import Dispatcher, Tally

# how often a wish to stop is looked for
POLL_SECONDS = 0.2

Messages: TypeAlias = "queue.Queue[tuple[_Process, Any]]"


def label_on_devices(
    out: str | Path,
    model: str,
    devices: Sequence[str],
    part: tuple[int, int] = (0, 1),
    *,
    report: Reporter | None = None,
    stop: threading.Event | None = None,
    threads: int | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    relabel_changed: bool = False,
    lock: bool = True,
) -> Summary:
    """Labels part `I` of `N` of what was planned in `out` with a process for each of `devices`.

    model: its folder or checkpoint. devices: of the plan's kind; the same one may be named twice. Who has room takes
    the next shard; a shard is the same whoever makes it. A process that dies is reported, and the others do its shards.
    threads: of torch, workers: those that read and tokenize, in each process; by default they share the machine's. The
    rest is as in `label_part`. Raises LabellingError also when the last process has died: what was finished is kept.
    """
    planned = read_plan(Path(out))
    with FolderLock(planned.out, needed=lock, shared=True):
        store = part_store(planned, part)
        pending = pending_shards(store, planned.rows, retry_failed=retry_failed, relabel_changed=relabel_changed)
        task = {
            "out": str(planned.out.absolute()),
            "model": model,
            "lock": lock,
            "threads": threads or max(1, torch.get_num_threads() // len(devices)),
            "workers": workers or max(1, min(8, (os.cpu_count() or 1) // len(devices))),
        }
        run = _Run(planned, devices, task, report or Silent(), stop or threading.Event())
        began = time.perf_counter()
        announce(run.tally.say, store, pending, planned.rows.passed_over)
        run.label([shard.index for shard in pending])
        # what they have written
        store = part_store(planned, part)
        run.check(store)
        summary = summarize(store, run.tally.meter, time.perf_counter() - began)
        run.tally.say("summary", **asdict(summary))
        return summary


class _Process:
    """A process with a device; its messages come to `messages` with itself, None when it has ended."""

    def __init__(self, device: str, task: dict[str, Any], messages: Messages) -> None:
        self.device = device
        # the last words: what it failed of, or that it is done
        self.failure: str | None = None
        self.done = False
        # a module is found as it is found here
        flags = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
        # Ctrl-C is ours to pass on; when this process dies, they see that their input ends
        self._process = subprocess.Popen(
            [sys.executable, *flags, "-m", "spear_fast.labelling.device_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self.pid = self._process.pid
        self.tell({**task, "device": device})
        threading.Thread(target=self._listen, args=[messages], daemon=True).start()

    def _listen(self, messages: Messages) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                try:
                    messages.put((self, json.loads(line)))
                except ValueError:
                    # cut short by its death
                    break
        messages.put((self, None))

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a message; that nobody takes it any more is heard otherwise."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def end(self) -> str:
        """Waits until the process is gone, and returns how it ended."""
        status = self._process.wait()
        if self.failure is not None:
            return self.failure
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"

    def kill(self) -> None:
        """Ends the process where it has not ended."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()


class _Run:
    """The processes of one run, and what is left to do."""

    def __init__(
        self, planned: JobPlan, devices: Sequence[str], task: dict[str, Any], report: Reporter, stop: threading.Event
    ) -> None:
        self.tally = Tally(report)
        self._devices, self._task, self._stop = list(devices), task, stop
        self._numbers = {shard.name: shard.index for shard in planned.shards}
        self._dispatcher = Dispatcher(())
        self._messages: Messages = queue.Queue()
        self._fault: str | None = None
        self._told_to_stop = False

    def label(self, shards: Sequence[int]) -> None:
        """Labels shards until they are done, all processes have died, or somebody wants it to stop."""
        self._dispatcher = Dispatcher(shards)
        alive = self._devices
        while self._dispatcher.left and alive and not self._told_to_stop:
            # a second time only where one died after the others had ended
            alive = self._round(alive[: self._dispatcher.left])

    def check(self, store: PartStore) -> None:
        """Raises LabellingError when something went wrong, Interrupted when the run was stopped before its end.

        store: what is written by now.
        """
        if self._fault is not None:
            raise LabellingError(self._fault)
        missing = len(store.shards) - len(store.committed)
        if self._dispatcher.left and self._stop.is_set():
            raise Interrupted(progress(store, self.tally.kept))
        if self._dispatcher.left or missing:
            raise LabellingError(
                f"{max(missing, self._dispatcher.left)} shards are not labelled, since no process is left; run the "
                "same command again to resume."
            )

    def _round(self, devices: Sequence[str]) -> list[str]:
        """Lets a process for each device label what there is; returns the devices of those that did not die."""
        processes: list[_Process] = []
        try:
            for device in devices:
                processes.append(_Process(device, self._task, self._messages))
                self.tally.say("process", device=device, pid=processes[-1].pid)
            running = set(processes)
            while running:
                self._pass_on_stop(running)
                try:
                    process, message = self._messages.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if message is not None:
                    self._take(process, message, len(devices))
                    continue
                running.remove(process)
                self._take_end(process)
        finally:
            for process in processes:
                process.kill()
        return [process.device for process in processes if process.done]

    def _pass_on_stop(self, running: set[_Process]) -> None:
        wanted = self._stop.is_set() or self._fault is not None
        if not wanted or self._told_to_stop:
            return
        self._told_to_stop = True
        for process in running:
            process.tell({"stop": True})

    def _take(self, process: _Process, message: dict[str, Any], processes: int) -> None:
        if "claim" in message:
            process.tell({"shard": None if self._told_to_stop else self._dispatcher.claim(process)})
        elif "failure" in message:
            process.failure = message["failure"]
            if message["of_all"]:
                self._fault = message["failure"]
        elif "done" in message:
            process.done = True
        else:
            event, fields = message["event"], message["fields"]
            if event == "shard":
                self._dispatcher.done(process, self._numbers[fields["name"]])
            self.tally.take(process, event, {**fields, "pid": process.pid}, processes)

    def _take_end(self, process: _Process) -> None:
        how = process.end()
        if process.done or self._fault is not None:
            return
        shards = self._dispatcher.release(process)
        gone = f"; the others do the shards that it was at: {len(shards)}" if shards else ""
        self.tally.say("warning", message=f"the process for {process.device} has died of {how}{gone}.")
        self.tally.lose(process)
