"""How many threads torch takes: as many as there are cores, or fewer where other work runs already.

OpenMP splits an operator among the cores and waits for the slowest thread, and meanwhile the others spin. Alone on a
machine that is fastest. Where another process has a core, one thread is always late and the others burn the time that
it needs, thousands of times a second. So a look at the machine before torch is imported chooses: no other work, nothing
is set; other work, one thread for each core that is left, and threads that sleep while they wait.
scripts/bench_busy.py has the numbers.
"""

import os
import sys
import time
from pathlib import Path

ANSWERED = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # a user's own word on it
LOOKS, PAUSE = 5, 0.01  # how often, and every how many seconds, the machine is looked at


def settle() -> str | None:
    """Chooses the threads by what else runs now, unless the user has said. Call it before torch is imported.

    The processes that a run or a sweep starts inherit the choice. Returns what was chosen, in words; None: nothing.
    """
    if "torch" in sys.modules or any(name in os.environ for name in ANSWERED):
        return None
    count = cores()
    if (free := max(1, count - others_running(count))) == count:
        return None
    os.environ |= {"OMP_NUM_THREADS": str(free), "OMP_WAIT_POLICY": "passive"}
    return f"{free} of {count} cores, as other work runs"


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def others_running(cores: int) -> int:
    """How many of this process's cores other processes occupy: the median of a few looks; 0 where nothing tells."""
    looks = []
    for _ in range(LOOKS):
        try:
            running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1  # all but this one
        except (OSError, ValueError, IndexError):
            return 0
        looks.append(running + cores - (os.cpu_count() or cores))  # more than the machine's other cores can take
        time.sleep(PAUSE)
    return min(cores, max(0, sorted(looks)[LOOKS // 2]))
