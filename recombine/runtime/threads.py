"""How torch's threads wait for each other: briefly awake, then asleep.

OpenMP splits the work of an operator among the cores and lets the threads that are through early wait for the others.
GNU's OpenMP, which torch's Linux packages bring, lets them spin for 300,000 rounds, some 10 ms. Alone on a machine that
costs nothing. Where another process has one of the cores, a thread that spins takes the time of the one it waits for, a
thousand times a second. After SPINS rounds a thread sleeps instead; waking it takes some microseconds. The sums are the
same, bit for bit, since the number of threads is. scripts/bench_busy.py has the numbers.
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
