"""A run of the evaluation killed again and again, then finished, against one that nothing disturbed.

`python -m tests.measure.kills [KILLS]`: one to three processes at a time are started as torchrun would, and killed
(SIGKILL) at a random moment; after all kills the run is finished by another number of processes. Prints what differs:
nothing should.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dag.evaluation.ledger import lines

OPTIONS = "--prompts shapes --count 60 --steps 6 --height 64 --width 64 --batch-size 2 --methods none,dag:warmup=0"


def start(folder: Path, world: int) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "dag.evaluation", "draw", str(folder), *OPTIONS.split()]
    return [
        subprocess.Popen(
            command, env=os.environ | {"RANK": str(k), "WORLD_SIZE": str(world)}, stdout=subprocess.PIPE, text=True
        )
        for k in range(world)
    ]


def content(folder: Path) -> tuple[list[str], dict[str, bytes]]:
    """The pictures' rows without what tells of time, in order; the pictures' files."""
    rows = [row for file in folder.glob("rows/*.jsonl") for row in lines(file) if row["kind"] == "picture"]
    told = sorted(json.dumps(row | {"seconds": 0}) for row in rows)
    return told, {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("pictures/**/*.*")}


def main() -> None:
    kills, rng = int(sys.argv[1]) if len(sys.argv) > 1 else 30, random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name, "whole"), Path(name, "broken")
        began = time.time()
        for process in start(whole, 1):
            print(process.communicate()[0].strip())
        seconds = time.time() - began
        for k in range(kills):
            processes = start(broken, 1 + k % 3)
            time.sleep(rng.uniform(0, 12))
            for process in processes:
                process.kill()
                process.wait()
            torn = sum(not file.read_bytes().endswith(b"\n") for file in broken.glob("rows/*.jsonl"))
            half = len(list(broken.rglob("*.tmp")))
            print(f"kill {k + 1}: {len(content(broken)[0])} rows, {torn} torn lines, {half} half files", flush=True)
        for process in start(broken, 2):
            print(process.communicate()[0].strip())
        (rows, files), (then, left) = content(whole), content(broken)
        print(f"undisturbed: {len(rows)} rows in {seconds:.0f} s; after {kills} kills: {len(then)} rows")
        differ = [file for file in files.keys() | left.keys() if files.get(file) != left.get(file)]
        print(f"rows that differ: {len(set(rows) ^ set(then))}, rows twice: {len(then) - len(set(then))}")
        print(f"files that differ: {len(differ)} of {len(files)} {differ[:3]}")


if __name__ == "__main__":
    main()
