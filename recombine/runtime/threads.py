"""How torch's threads wait for each other: briefly awake, then asleep.

OpenMP splits the work of an operator among the cores, and threads that are through early wait for the others. GNU's
OpenMP, which torch's Linux packages bring, lets them spin for 300,000 rounds first. Where another process wants the
cores, a thread that spins takes the time of the one it waits for. Here a thread sleeps after SPINS rounds. The number
of threads stays, so the sums are the same, bit for bit. scripts/bench_busy.py measures both.
"""

import os

SPINS = 1000
ANSWERED = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # variables with which a user says how threads wait


def wait_asleep() -> None:
    """Sets the spin count, unless the user says how threads wait. Call it before torch is imported.

    The processes that a run or a sweep starts inherit it.
    """
    if not any(name in os.environ for name in ANSWERED):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
