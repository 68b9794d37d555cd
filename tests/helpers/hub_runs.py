"""run.py's commands in processes forked from one that has imported what they need: python tests/helpers/hub_runs.py

A line of JSON on stdin is a command: its arguments, and the file that gets its output. Its exit code is the answer.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    import run
    from recombine.data.language import instructions, text  # noqa: F401
    from recombine.data.text import glue  # noqa: F401
    from recombine.data.vision import suites, vtab  # noqa: F401
    from recombine.models import causal_lm, encoders  # noqa: F401
    from recombine.runner import pipeline, pool  # noqa: F401
    from scripts import forked

    pool.hire = forked.fork_worker
    for line in sys.stdin:
        arguments, log = json.loads(line)

        def work(arguments=arguments, log=log) -> int:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.argv = ["run.py", *arguments]
            return run.cli()

        print(forked.Child(work).wait(), flush=True)


if __name__ == "__main__":
    serve()
