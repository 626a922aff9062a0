"""Parts of a plan as an array of Slurm, on a cluster of this one node: a task killed in a shard is queued again.

Needs root, and Debian's `slurm-wlm` and `munge` (apt-get install slurm-wlm munge); the daemons run from a folder of
their own and touch nothing of the system's. Part of `make scale`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time

import pytest
from labelling_jobs import random_rows, shard_bytes, tiny_model, write_lines

from spear_fast.labelling import LabelOptions, label, plan

DAEMONS = ("munged", "slurmctld", "slurmd")
MISSING = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed ({', '.join(MISSING)}): slurm-wlm and munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons want root"),
]

OPTIONS = LabelOptions(max_length=20, rows_per_shard=400, batch_tokens=1024, max_source_tokens=40)
# cred_expire: how long a job that is queued again waits, in seconds; by default two minutes
CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Starts munge and Slurm, and returns what runs a command of it."""
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    for path in (tmp_path, folder):
        # munge takes a socket only in folders that others cannot write
        path.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(host=host, folder=folder, ports=(free_port(), free_port()))
    (folder / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    munge = ["--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munge += [f"--{kind}-file={folder}/munged.{kind}" for kind in ("pid", "log", "seed")]
    commands = [["munged", *munge], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]]

    def run(*command):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    with contextlib.ExitStack() as stack:
        for command in commands:
            with open(folder / f"{command[0]}.out", "wb") as log:
                daemon = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            stack.callback(daemon.terminate)
            wait(lambda: (folder / "munge.socket").exists(), folder)
        wait(
            lambda: "idle" in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout, folder
        )
        yield run


def wait(reached, folder, seconds=90):
    deadline = time.monotonic() + seconds
    while not reached():
        said = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.[ol][uo][tg]"))
        assert time.monotonic() < deadline, said
        time.sleep(0.01)


@pytest.mark.timeout(300)
def test_an_array_whose_task_is_killed_in_a_shard_and_queued_again(slurm, tmp_path):
    model, out = tiny_model(), tmp_path / "out"
    model.save_pretrained(tmp_path / "model")
    tokens = write_lines(tmp_path / "t.jsonl", random_rows(1600))
    label([tokens], model, tmp_path / "whole", OPTIONS)
    plan([tokens], model, out, OPTIONS, model_path=str(tmp_path / "model"))
    spear_fast = lambda *given: shlex.join([sys.executable, "-m", "spear_fast", *given, "--out", str(out)])  # noqa: E731
    log = f"--output={tmp_path}/slurm/%j-%a.log"
    submit = ("sbatch", "--parsable", log)
    job = slurm(*submit, "--array=0-1", "--requeue", "--open-mode=append", "--wrap", spear_fast("label"))
    last = [*submit, "--wait", f"--dependency=afterok:{job}", "--wrap", spear_fast("finish")]
    with subprocess.Popen(last, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as finishing:
        # the second task is at its first shard
        journal = out / ".labels-00001-of-00004.parquet.journal"
        wait(lambda: journal.exists() and journal.stat().st_size > 0, tmp_path / "slurm")
        slurm("scontrol", "requeue", f"{job}_1")
        assert len(shard_bytes(out)) < 4
        said = finishing.communicate(timeout=200)
        assert finishing.returncode == 0, said
    shown = slurm("scontrol", "show", "job", job, "--oneliner")
    assert {word for word in shown.split() if word.startswith("Restarts=")} == {"Restarts=0", "Restarts=1"}
    assert json.loads((out / "manifest.json").read_text())["complete"]
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
