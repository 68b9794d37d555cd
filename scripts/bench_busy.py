"""How a training loop fares beside other work: torch's threads as OpenMP sets them up, and as runtime/threads.py does.

    python scripts/bench_busy.py [--rounds 4]

A sample is a process that trains a small ViT with random weights. The rivals take turns, alone and beside a process
that burns one core. A sample is cut into windows of some steps. Those in which anybody else took more than a tenth of
a core, by /proc/stat, do not count, so a machine with other users still gives honest numbers, if later.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recombine.runtime import threads

FOREIGN = 0.1  # cores that others may take during a window
STEPS = 4  # of a window
TODAY, OURS = "OpenMP's own", "settled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="samples of every rival, alone and beside the other")
    parser.add_argument("--windows", type=int, default=8, help="windows that count, of a sample")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds that a sample waits for them")
    parser.add_argument("--child", type=int, default=None, help=argparse.SUPPRESS)  # the busy process, or 0
    parser.add_argument("--rival", default=TODAY, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        if args.rival == OURS:
            threads.settle()
        return print(*train(args.windows, args.patience, args.child))
    rivals = (TODAY, OURS)
    seconds: dict[tuple[str, bool], list[float]] = {(name, busy): [] for name in rivals for busy in (False, True)}
    for done in range(1, args.rounds + 1):
        for busy in (False, True):
            with subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else open(os.devnull) as other:
                for name in rivals:
                    seconds[name, busy] += sample(name, args, other.pid if busy else 0)
                if busy:
                    other.kill()
        print(f"after {done} of {args.rounds} rounds, load {os.getloadavg()[0]:.1f}", flush=True)
        table(seconds, list(rivals))


def sample(rival: str, args: argparse.Namespace, other: int) -> list[float]:
    """Seconds of the windows of one process that count."""
    clean = {key: value for key, value in os.environ.items() if key not in threads.ANSWERED}
    options = {"--windows": args.windows, "--patience": args.patience, "--child": other, "--rival": rival}
    command = [sys.executable, "-W", "ignore", __file__, *(str(part) for pair in options.items() for part in pair)]
    done = subprocess.run(command, env=clean, stdout=subprocess.PIPE, text=True, check=True)
    return [float(value) for value in done.stdout.split()]


def table(seconds: dict[tuple[str, bool], list[float]], rivals: list[str]) -> None:
    """Medians, and their ratios to what OpenMP does by itself on an idle machine."""
    median = {key: statistics.median(found or [float("nan")]) for key, found in seconds.items()}
    today = median[TODAY, False]
    print(f"{'':14}{'alone':>9}{'busy':>9}{'alone / today alone':>22}{'busy / today alone':>22}   windows")
    for name in rivals:
        alone, busy = median[name, False], median[name, True]
        counts = f"{len(seconds[name, False])}, {len(seconds[name, True])}"
        print(f"{name:14}{alone:7.3f} s{busy:7.3f} s{alone / today:22.3f}{busy / today:22.3f}   {counts}", flush=True)


def train(windows: int, patience: float, other: int) -> list[float]:
    """Seconds of the windows in which nobody but this process and `other` used the machine."""
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=16, img_size=56)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, labels = torch.randn(16, 3, 56, 56), torch.randint(16, (16,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    step()
    found, end = [], time.monotonic() + patience
    while len(found) < windows and time.monotonic() < end:
        used, start = foreign(other), time.perf_counter()
        for _ in range(STEPS):
            step()
        seconds = time.perf_counter() - start
        if (foreign(other) - used) / seconds <= FOREIGN:
            found.append(seconds)
    return found


def foreign(other: int) -> float:
    """CPU seconds that the machine spent on anything but this process and `other`."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:8])
    burnt = sum(map(int, Path(f"/proc/{other}/stat").read_text().rsplit(")")[-1].split()[11:13])) if other else 0
    return (user + nice + system + irq + softirq - burnt) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


if __name__ == "__main__":
    main()
