"""Unpacks and checks a VTAB-1k folder, and says what is missing.

    python scripts/prepare_vtab.py vtab-1k                           check all 19 tasks
    python scripts/prepare_vtab.py vtab-1k --zip vtab-1k.zip         unpack an archive there first
    python scripts/prepare_vtab.py vtab-1k --hub                     fetch that archive (4.7 GB) from the hub first
    python scripts/prepare_vtab.py vtab-1k --task kitti --pictures   one task, and decode every picture

Then: python run.py data=vtab data.root=vtab-1k data.task=kitti. Exit code 0: nothing is missing.
"""

import argparse
import sys
from pathlib import Path

from recombine.data import hub
from recombine.data.vision.vtab import ARCHIVE, REPOSITORY, Vtab, complaints, unpack
from recombine.errors import UsageError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the folder of the task folders")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--zip", type=Path, help="an archive to unpack into it")
    source.add_argument("--hub", action="store_true", help=f"unpack {ARCHIVE} of {REPOSITORY} into it")
    parser.add_argument("--revision", default="main", help="commit of the hub's archive")
    parser.add_argument("--task", action="append", choices=list(Vtab.rows), help="only this one; may be repeated")
    parser.add_argument("--pictures", action="store_true", help="decode every picture too")
    chosen = parser.parse_args(arguments)
    try:
        archive = chosen.zip
        if chosen.hub:
            found = hub.download(REPOSITORY, chosen.revision, [ARCHIVE])
            print(f"{REPOSITORY} at {found.name}")
            archive = found / ARCHIVE
        if archive:
            print(f"unpacked {', '.join(unpack(archive, chosen.root)) or 'nothing new'}")
    except UsageError as error:
        print(f"prepare_vtab.py: {error}", file=sys.stderr)
        return 2
    bad = 0
    for task in chosen.task or Vtab.rows:
        found = complaints(chosen.root, task, chosen.pictures)
        print(f"{task:22}{'ok' if not found else found[0]}")
        for line in found[1:]:
            print(f"{'':22}{line}")
        bad += bool(found)
    tasks = len(chosen.task or Vtab.rows)
    print(f"{tasks - bad} of {tasks} tasks are complete" + (f"; {ways(chosen.root)}" if bad else ""))
    return 1 if bad else 0


def ways(root: Path) -> str:
    return (
        f"these pictures come only as NOAH's folder: {ARCHIVE} of the hub's {REPOSITORY} (--hub, or --zip FILE), "
        f"what SSF and RepAdapter share, or NOAH's own script over TFDS; put the task folders into {root}"
    )


if __name__ == "__main__":
    sys.exit(main())
