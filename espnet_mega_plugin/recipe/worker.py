"""A process that runs one ESPnet command after another, so that importing ESPnet (6 to 12 s) is paid once.

Each line of standard input is a job, `{"module": ..., "arguments": [...], "log": path}`; each job is the call of that
module's own `main(arguments)`, its output goes to the job's log, and one line `{"status": n}` answers it.
"""

import importlib
import json
import logging
import os
import sys
import traceback


def run_command(module: str, arguments: list[str]) -> int:
    """Run `python -m module arguments` inside this process; returns its exit status."""
    # ESPnet calls logging.basicConfig once a process: without handlers it takes effect for every command
    logging.getLogger().handlers.clear()
    command = importlib.import_module(module)
    sys.argv = [command.__file__, *arguments]  # what the command prints of itself
    try:
        command.main(arguments)
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        job = json.loads(line)
        with open(job["log"], "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        status = run_command(job["module"], job["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        answers.write(json.dumps({"status": status}) + "\n")


if __name__ == "__main__":
    main()
