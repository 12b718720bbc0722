"""What a run of sample.py leaves in its folder: pictures, maps and report.json; and how a later run takes it up."""

import json
import re
from pathlib import Path

import numpy as np

from weights.files import atomic_write

from .parsing import UsageError, slug, warn
from .pictures import is_whole, save_png, strip
from .report import Drawing
from .setup import write_text


class Records:
    """The entries of a run's report, by number of the picture and of the method, and the files that they tell of.

    settings: of the whole run, with the methods' names under "guidance". jobs: what each picture's entry starts from,
    its prompt and seed. Raises ValueError where report.json is a folder.
    """

    def __init__(self, folder: Path, settings: dict, jobs: list[dict]):
        self.folder, self.settings, self.jobs = folder, settings, jobs
        self.path, self.methods = folder / "report.json", settings["guidance"]
        if self.path.is_dir():
            raise ValueError(f"{self.path}: is a folder; expected a file, or another --out")
        self.entries: dict[tuple[int, int], dict] = {}

    def missing(self) -> list[int]:
        """The pictures that some method has not drawn."""
        return [k for k in range(len(self.jobs)) if any((k, m) not in self.entries for m in range(len(self.methods)))]

    def stem(self, k: int, m: int) -> str:
        """The name of a picture's file, without .png."""
        return f"{k:03d}-{slug(self.jobs[k]['prompt'])}" + (f"-{self.methods[m]}" if len(self.methods) > 1 else "")

    def save(self, k: int, m: int, drawing: Drawing) -> None:
        """Write a picture, and its maps if the settings ask for them. One that failed takes no earlier one's place."""
        entry = self.jobs[k] | {"file": None, "guidance": drawing.method}
        if drawing.failed:
            warn(f"'{drawing.prompt}' (seed {drawing.seed}), {drawing.method}: no picture, {drawing.failed}")
            self.entries.setdefault((k, m), entry | {"failed": drawing.failed})
            return
        name = self.stem(k, m)
        entry |= {"file": f"{name}.png", "unet_rows": drawing.unet_rows, "seconds": round(drawing.seconds, 3)}
        entry |= drawing.findings
        save_png(drawing.image, self.folder / f"{name}.png", {"settings": json.dumps(self.settings | entry)})
        if self.settings["save_maps"] and drawing.A is not None:
            maps = drawing.A.amax(1)  # (steps, H, W), the largest of all concepts'
            with atomic_write(self.folder / f"{name}-maps.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, maps.numpy())
            save_png(strip(maps), self.folder / f"{name}-maps.png")
        self.entries[k, m] = entry

    def write(self) -> None:
        """Write report.json, a line each for the settings and for every picture."""
        parts = self.settings, *(self.entries[key] for key in sorted(self.entries))
        told, *lines = (json.dumps(part, ensure_ascii=False) for part in parts)  # json's indentation is 10 times slower
        listed = ",\n".join(lines)
        write_text(self.path, f'{{"settings": {told},\n"pictures": [\n{listed}\n]}}')

    def resume(self) -> None:
        """Take over the entries of an earlier run's report whose files are there.

        Raises ValueError for what is no report, UsageError where that run had other settings or prompts.
        """
        if not self.path.exists():
            return
        try:
            earlier = json.loads(self.path.read_text(encoding="utf-8-sig"))
            then, told = earlier["settings"], [entry for entry in earlier["pictures"] if str.strip(entry["file"] or "")]
            now = json.loads(json.dumps(self.settings))
            for each in (now, then):  # fused or plain; the reason may tell of other times
                each["attention"] = re.match(r"\w*", each["attention"])[0]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(f"{self.path}: not a report of sample.py; expected the one to --resume, or none") from e
        if other := [key for key in now | then if now.get(key) != then.get(key)]:
            found = f"{self.path} was made with {other[0]} {then.get(other[0])}, now it is {now.get(other[0])}"
            raise UsageError(f"--resume: {found}; expected the same settings, or another --out")
        keys = [(k, m) for k in range(len(self.jobs)) for m in range(len(self.methods))]
        planned = {f"{self.stem(*key)}.png": key for key in keys}
        for entry in told:
            key = planned.get(entry["file"])
            if key is None or not self.jobs[key[0]].items() <= entry.items():
                found = f"{self.path} tells of {entry['file']}, seed {entry.get('seed')}"
                expected = "these prompts, and maybe more after them, or another --out"
                raise UsageError(f"--resume: {found}, which these prompts do not draw; expected {expected}")
            if self.complete(entry, self.stem(*key)):
                self.entries[key] = entry

    def complete(self, entry: dict, name: str) -> bool:
        """Whether an entry's picture is there to its end, and its maps if they were asked for."""
        maps = self.folder / f"{name}-maps.npy"
        wanted = self.settings["save_maps"] and entry.get("map_max") is not None
        return is_whole(self.folder / f"{name}.png") and (maps.is_file() or not wanted)
