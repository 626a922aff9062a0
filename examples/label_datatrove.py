"""Labels what was planned with datatrove's executors: on this machine, or as an array of Slurm.

    spear-fast plan SOURCE... --model MODEL --out OUT
    python examples/label_datatrove.py OUT [--tasks N] [--workers N] [--slurm PARTITION]
    spear-fast finish --out OUT

Killed and run again, it does the tasks that are not done, and of these what is not labelled. Needs the extra
`datatrove`.
"""

from __future__ import annotations

import argparse
from functools import partial

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

from spear_fast.labelling.datatrove import label_shards


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--tasks", type=int, default=4, help="parts of the job")
    parser.add_argument("--workers", type=int, default=1, help="tasks at a time")
    parser.add_argument("--slurm", metavar="PARTITION", help="an array of Slurm, one GPU for each task")
    arguments = parser.parse_args()
    pipeline = [partial(label_shards, out=arguments.out)]
    common = {"tasks": arguments.tasks, "workers": arguments.workers, "logging_dir": f"{arguments.out}/datatrove"}
    if arguments.slurm:
        SlurmPipelineExecutor(
            pipeline, time="24:00:00", partition=arguments.slurm, gpus_per_task=1, job_name="label", **common
        ).run()
    else:
        LocalPipelineExecutor(pipeline, **common).run()


if __name__ == "__main__":
    main()
