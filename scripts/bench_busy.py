"""How a training loop fares beside other work: torch's threads as OpenMP sets them up, and as runtime/threads.py does.

    python scripts/bench_busy.py [--spins 1000 10000] [--repeats 8]

Every sample is a process of its own that trains a small ViT with random weights for some steps. The rivals take turns,
alone and beside a process that burns one core. Where more than a tenth of a core went to anybody else, by /proc/stat,
the sample is measured again, so a machine with other users still gives honest numbers.
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

FOREIGN = 0.1  # cores that others may take during a sample
TRIES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", nargs="*", default=[threads.SPINS], help="spin counts that rival today's")
    parser.add_argument("--repeats", type=int, default=8, help="samples of every rival, alone and beside the other")
    parser.add_argument("--steps", type=int, default=20, help="training steps of a sample")
    parser.add_argument("--child", type=int, default=None, help=argparse.SUPPRESS)  # the busy process, or 0
    args = parser.parse_args()
    if args.child is not None:
        return print(*train(args.steps, args.child))
    rivals = {"OpenMP's": {}} | {f"spins={n}": {"GOMP_SPINCOUNT": str(n)} for n in args.spins}
    seconds: dict[tuple[str, bool], list[float]] = {(name, busy): [] for name in rivals for busy in (False, True)}
    for repeat in range(args.repeats):
        for busy in (False, True):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            for name, environment in rivals.items():
                seconds[name, busy].append(sample(environment, args.steps, other.pid if other else 0))
            if other:
                other.kill()
                other.wait()
        print(f"round {repeat + 1} of {args.repeats}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    today = statistics.median(seconds["OpenMP's", False])
    print(f"{'':16} alone s  busy s  alone to OpenMP's alone  busy to OpenMP's alone")
    for name in rivals:
        alone, busy = (statistics.median(seconds[name, key]) for key in (False, True))
        print(f"{name:16} {alone:7.2f} {busy:7.2f}  {alone / today:23.3f}  {busy / today:22.2f}")


def sample(environment: dict[str, str], steps: int, other: int) -> float:
    """Seconds of one process's loop, without its start, from a stretch in which nobody else worked much."""
    clean = {key: value for key, value in os.environ.items() if key not in threads.ANSWERED}
    command = [sys.executable, "-W", "ignore", __file__, "--steps", str(steps), "--child", str(other)]
    for _ in range(TRIES):
        done = subprocess.run(command, env=clean | environment, stdout=subprocess.PIPE, text=True, check=True)
        seconds, foreign = map(float, done.stdout.split())
        if foreign <= FOREIGN:
            return seconds
        time.sleep(1)
    print(f"other work took {foreign:.2f} cores in {TRIES} tries: this sample counts less", file=sys.stderr)
    return seconds


def train(steps: int, other: int) -> tuple[float, float]:
    """(seconds, cores that others than this process and `other` used meanwhile)."""
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=16, img_size=56)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, labels = torch.randn(8, 3, 56, 56), torch.randint(16, (8,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    for _ in range(3):
        step()
    used, start = ticks(other), time.perf_counter()
    for _ in range(steps):
        step()
    seconds = time.perf_counter() - start
    return seconds, (ticks(other) - used) / os.sysconf("SC_CLK_TCK") / seconds


def ticks(other: int) -> float:
    """Clock ticks that the machine's cores spent on anything but this process and `other`."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:8])
    own = sum(os.times()[:2]) * os.sysconf("SC_CLK_TCK")
    burnt = sum(map(int, Path(f"/proc/{other}/stat").read_text().rsplit(")")[-1].split()[11:13])) if other else 0
    return user + nice + system + irq + softirq - own - burnt


if __name__ == "__main__":
    main()
