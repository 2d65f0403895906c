"""Run commands on a Slurm cluster and wait for them: the recipe's slurm.pl.

    slurm.pl [--gpu 1] [--mem 4G] [--time 24:0:0] [--max-jobs-run N] JOB=1:4 exp/log/stats.JOB.log command ... JOB ...

submits one job, or an array of them, through `sbatch --wait`. A job changes into the present folder, sources its
path.sh where there is one, and writes the command's output to the log, closed by a line `# Ended (code N)`. The form is
that of Kaldi's slurm.pl, and so is the file of settings (--config; default conf/slurm.conf where there is one):

    command sbatch --export=PATH              the command that submits
    option gpu=* -p gpu --gres=gpu:$0         what `--gpu 2` adds to it, with 2 for $0
    option gpu=0 -p cpu                       an exact value goes before *
    default gpu=0                             where the option is not given

Of several --num_threads the largest counts: ESPnet's launcher adds its own, a CPU a GPU, to that of --train_threads.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from espnet_mega_plugin.recipe.jobs import Call, leave_on_signals, log_tail, numbered, parse_call

DEFAULT_CONFIG = """\
command sbatch --export=PATH
option name=* --job-name $0
option time=* --time $0
option mem=* --mem-per-cpu $0
option mem=0
option num_threads=* --cpus-per-task $0
option num_nodes=* --nodes $0 --ntasks-per-node 1
default gpu=0
option gpu=0
option gpu=* --gres=gpu:$0
"""
TASK = '"${SLURM_ARRAY_TASK_ID}"'
ENDED = re.compile(r"^# Ended \(code (\d+)\)", re.MULTILINE)


def submission(config: str, options: Mapping[str, str]) -> list[str]:
    """The command that submits, with what the options add to it.

    Raises:
        ValueError: a line that is none of the three kinds, or an option that the settings do not have.
    """
    command: list[str] = []
    added: dict[tuple[str, str], str] = {}
    values: dict[str, str] = {}
    for line in config.splitlines():
        kind, _, rest = line.split("#", 1)[0].strip().partition(" ")
        if not kind:
            continue
        name, _, value = rest.strip().partition("=")
        if kind == "command":
            command = shlex.split(rest)
        elif kind == "default":
            values[name] = value
        elif kind == "option":
            value, _, text = value.partition(" ")
            added[name, value] = text.strip()
        else:
            raise ValueError(f"not a line of a slurm.conf: {line!r}; expected command, option or default")
    values.update({name: value for name, value in options.items() if name not in ("config", "max_jobs_run")})
    if not command:
        raise ValueError("the settings have no line 'command sbatch ...'")
    for name, value in values.items():
        text = added.get((name, value), added.get((name, "*")))
        if text is None:
            known = ", ".join(sorted({f"--{name}" for name, _ in added}))
            raise ValueError(f"--{name} {value}: no line 'option {name}=*' in the settings; there are {known}")
        command += shlex.split(text.replace("$0", value))
    return command


def job_script(call: Call, folder: Path) -> str:
    """The batch script: change into `folder`, source path.sh, run the command with its output in the log.

    From version 22.05 on Slurm's srun no longer takes over the CPUs of the job that it runs in (its release notes), so
    they are named to it.
    """

    def quoted(word: str) -> str:
        if call.word is None:
            return shlex.quote(word)
        parts = re.split(rf"\b{call.word}\b", word)
        return TASK.join(shlex.quote(part) if part or len(parts) == 1 else "" for part in parts)

    command = " ".join(map(quoted, call.command))
    return f"""#!/bin/bash
cd {shlex.quote(str(folder))} || exit 1
[ ! -f path.sh ] || . ./path.sh
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK="${{SLURM_CPUS_PER_TASK}}"
log={quoted(call.log)}
mkdir -p "$(dirname "${{log}}")"
{{
    echo "# Running on $(hostname), job ${{SLURM_JOB_ID:-}}, started $(date)"
    echo "# "{shlex.quote(command)}
}} > "${{log}}"
SECONDS=0
( {command} ) >> "${{log}}" 2>&1 < /dev/null
status=$?
echo "# Ended (code ${{status}}) after ${{SECONDS}} s, $(date)" >> "${{log}}"
exit ${{status}}
"""


def run(call: Call, config: str, folder: Path) -> None:
    """Submit, wait, and see that every job ended well; a job that is no longer waited for is cancelled.

    Raises:
        FileNotFoundError: there is no sbatch.
        ValueError: see `submission`.
        RuntimeError: a job failed or never ran; names its log and shows the log's end.
    """
    command = submission(config, call.options)
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]}: no such command; is this a login node of a Slurm cluster?")
    logs = [Path(numbered(call.log, n, call.word)) for n in call.numbers] if call.word else [Path(call.log)]
    for log in logs:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
    queue = Path(call.log).parent / "q"
    queue.mkdir(exist_ok=True)
    name = Path(call.log).stem
    script = queue / f"{name}.sh"
    script.write_text(job_script(call, folder), encoding="utf-8")
    command += ["--wait", "--parsable", "--output", str(queue / f"{name}.%j.out")]
    if call.word:
        limit = f"%{call.options['max_jobs_run']}" if "max_jobs_run" in call.options else ""
        command += ["--array", f"{call.numbers[0]}-{call.numbers[-1]}{limit}"]
    status = _wait([*command, str(script)])
    failed = [log for log in logs if _code(log) != 0]
    if status or failed:
        log = (failed or logs)[0]
        end = log_tail(log) if log.exists() else f"(it was not written; Slurm's own words: {queue / name}.*.out)"
        raise RuntimeError(
            f"{len(failed)} of {len(logs)} jobs failed (exit status {status}) of: {shlex.join(command)}\n"
            f"--- end of {log}\n{end}"
        )


def _wait(command: Sequence[str]) -> int:
    """sbatch --wait tells the job's number at once and ends with the job's exit status."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    number = ""
    try:
        number = process.stdout.readline().strip().partition(";")[0]
        return process.wait()
    finally:
        if process.poll() is None:
            if number:
                subprocess.run(["scancel", number], check=False)
            process.terminate()


def _code(log: Path) -> int | None:
    """Exit status that closes a log; None where there is none."""
    found = ENDED.findall(log.read_text(encoding="utf-8", errors="replace")) if log.exists() else []
    return int(found[-1]) if found else None


def most_threads(arguments: Sequence[str]) -> list[str]:
    """A call's arguments with one `--num_threads`, the largest of those given.

    Raises:
        ValueError: one of them is no number.
    """
    options, threads, rest = [], [], list(arguments)
    while len(rest) > 1 and rest[0].startswith("--"):
        name, value, *rest = rest
        if name not in ("--num_threads", "--num-threads"):
            options += [name, value]
        elif value.isdecimal():
            threads.append(int(value))
        else:
            raise ValueError(f"{name} {value}: expected a number")
    return [*options, *(("--num_threads", str(max(threads))) if threads else ()), *rest]


def main() -> None:
    leave_on_signals()
    try:
        call = parse_call(most_threads(sys.argv[1:]))
        path = Path(call.options.get("config", "conf/slurm.conf"))
        if "config" in call.options or path.exists():
            config = path.read_text(encoding="utf-8")
        else:
            config = DEFAULT_CONFIG
        run(call, config, Path.cwd())
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"slurm.pl: {error}")


if __name__ == "__main__":
    main()
