"""Programs named sbatch, srun and scancel that run a job on this machine, at once, and write down their arguments."""

import shlex
import sys
from pathlib import Path

PROGRAMS = {
    # --wait: tells the job's number, runs it (an array one after the other), ends with the largest exit status.
    # A job has the variables of --export and Slurm's own, and no others
    "sbatch": """
        parser.add_argument("--array", default="")
        parser.add_argument("--nodes", default="1")
        parser.add_argument("--cpus-per-task")
        parser.add_argument("--export", default="")
        job, _ = parser.parse_known_args()
        number = len((HERE / "sbatch.calls").read_text().splitlines())
        print(number, flush=True)
        first, _, last = job.array.partition("%")[0].partition("-")
        worst = 0
        for task in range(int(first), int(last) + 1) if job.array else [None]:
            env = {name: os.environ[name] for name in ("HOME", *job.export.split(",")) if name in os.environ}
            env |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": job.nodes}
            if job.cpus_per_task:
                env["SLURM_CPUS_PER_TASK"] = job.cpus_per_task
            if task is not None:
                env["SLURM_ARRAY_TASK_ID"] = str(task)
            process = subprocess.Popen(["bash", sys.argv[-1]], env=env, start_new_session=True)
            (HERE / f"{number}.pid").write_text(str(process.pid))
            worst = max(worst, process.wait())
        sys.exit(worst)
    """,
    # one task a node, all at once, each with the variables by which ESPnet knows a step of Slurm, and, as from Slurm
    # 22.05 on, with a CPU unless srun itself is asked for more
    "srun": """
        nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
        command = sys.argv[1:]
        while command[0].startswith("--"):
            command.pop(0)
        tasks = []
        for rank in range(nodes):
            step = {"SLURM_CPUS_PER_TASK": os.environ.get("SRUN_CPUS_PER_TASK", 1),
                    "SLURM_PROCID": rank, "SLURM_NODEID": rank, "SLURM_LOCALID": 0, "SLURM_NTASKS": nodes,
                    "SLURM_STEP_NUM_NODES": nodes, "SLURM_STEP_NODELIST": "localhost"}
            env = {**os.environ, **{name: str(value) for name, value in step.items()}}
            tasks.append(subprocess.Popen(command, env=env))
        sys.exit(max(task.wait() for task in tasks))
    """,
    "scancel": """
        os.killpg(int((HERE / f"{sys.argv[1]}.pid").read_text()), 15)
    """,
}  # fmt: skip


def install(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, body in PROGRAMS.items():
        lines = [f"#!{sys.executable}", "import argparse, os, shlex, subprocess, sys", "from pathlib import Path"]
        lines += ["HERE = Path(__file__).parent", "parser = argparse.ArgumentParser()"]
        lines += [
            f'with (HERE / "{name}.calls").open("a") as calls:',
            "    print(shlex.join(sys.argv[1:]), file=calls)",
        ]
        lines += [line.removeprefix(" " * 8) for line in body.splitlines()]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / name).chmod(0o755)


def calls(folder: Path, name: str) -> list[list[str]]:
    """The arguments of every call of a program, in order."""
    record = folder / f"{name}.calls"
    return [shlex.split(line) for line in record.read_text().splitlines()] if record.exists() else []
