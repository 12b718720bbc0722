"""A run's folder: what was drawn and what the scorers said of it, as rows. Every figure is a function of them.

  run.json                     settings: model, tokens, methods, prompt sets, steps, scale, size ...
  prompts.jsonl                the texts; the rows have only their sha256, since some sets may not be passed on
  pictures/SET/METHOD/ID-N.png
  rows/draw-PROCESS.jsonl      a row per picture, and one that says which process drew it, where and with what
  rows/SCORER.json             a scorer's settings
  rows/SCORER-PROCESS.jsonl    a row per picture

Each process that ever ran has files of its own, to which it only appends, a line at a time. So none waits for another,
and whatever stops one leaves at most its last line torn. Readers take all files together. `Run.gather` puts them into
one file, and `Run.read` takes that in the folder's place. Nothing here waits for torch.
"""

import json
import os
import secrets
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from dag.cli.parsing import UsageError
from weights.files import atomic_write

FORMAT = "dag-run-1"
MERGED = ("sets", "methods")  # of the settings: a later start may add to them


def process_name() -> str:
    """A name that no other process has, in order of time."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{rank()[0]}-{secrets.token_hex(3)}"


def rank() -> tuple[int, int]:
    """This process's number and how many there are: torchrun's variables, else those of srun, else 0 of 1.

    Raises UsageError for variables that make no sense.
    """
    for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if all(name in os.environ for name in names):
            try:
                k, n = (int(os.environ[name]) for name in names)
            except ValueError:
                k, n = -1, 0
            if not 0 <= k < n:
                found = ", ".join(f"{name}={os.environ[name]}" for name in names)
                raise UsageError(f"{found}: expected a rank from 0 and how many there are; start by torchrun or srun")
            return k, n
    return 0, 1


def create(path: Path, text: str, process: str) -> None:
    """Write a file whole, though other processes may be writing the same one."""
    own = path.with_name(f".{path.name}-{process}")
    with atomic_write(own) as temporary:
        temporary.write_text(text, encoding="utf-8")
    os.replace(own, path)


class Rows:
    """The file that one process appends its rows to; made with its first row."""

    def __init__(self, folder: Path, name: str, process: str):
        self.path, self.file = folder / "rows" / f"{name}-{process}.jsonl", None

    def append(self, row: dict) -> None:
        """Write a row and hand it to the system at once: it outlives this process."""
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab")
        self.file.write(written(row).encode())
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def written(row: dict) -> str:
    """A row as it stands in a file."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


def lines(path: Path) -> Iterator[dict]:
    """The rows of a file. A torn last line is left out; raises ValueError for any other that is not a JSON object."""
    *whole, torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
            kind = row["kind"]
        except (ValueError, TypeError, KeyError, RecursionError):
            kind = None
        if not isinstance(kind, str):
            found = f"{path}, line {number}: is {line[:60].decode(errors='replace')!r}"
            raise ValueError(f"{found}; expected a row, a JSON object with a kind; delete the line to go on without it")
        yield row


def loaded(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    except (ValueError, RecursionError):
        pass
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror}); expected the file that the first start wrote") from e
    raise ValueError(f"{path}: not a JSON object; expected the file that the first start wrote")


class Run:
    """The rows of a run. Read once, when first asked for.

    folder: of the run. `settings` is run.json's content, `scorers` the settings of each scorer.
    """

    def __init__(self, folder: Path, settings: dict, scorers: dict[str, dict], rows: Iterator[dict] | None = None):
        self.folder, self.settings, self.scorers, self._rows = folder, settings, scorers, rows
        self.gathered = rows is not None  # from one file: what stands beside the rows is not there

    @classmethod
    def read(cls, path: Path) -> "Run":
        """A run's folder, or the one file that `gather` made of it. Raises UsageError, ValueError."""
        if path.is_dir():
            if not (path / "run.json").is_file():
                raise UsageError(f"{path}: has no run.json; expected a folder made by `python -m dag.evaluation draw`")
            return cls(path, loaded(path / "run.json"), {f.stem: loaded(f) for f in sorted(path.glob("rows/*.json"))})
        if not path.is_file():
            raise UsageError(f"{path}: no such folder or file; expected a run's folder, or its rows.jsonl")
        rows = list(lines(path))
        heads = [row for row in rows if row["kind"] == "run"]
        if not heads:
            raise UsageError(
                f"{path}: no row of kind run; expected rows.jsonl as `python -m dag.evaluation table` makes it"
            )
        scorers = {row["name"]: row["settings"] for row in rows if row["kind"] == "scorer"}
        return cls(path.parent, heads[0]["settings"], scorers, iter(rows))

    @cached_property
    def rows(self) -> list[dict]:
        """All rows, of all processes."""
        if self._rows is not None:
            return list(self._rows)
        return [row for file in sorted(self.folder.glob("rows/*.jsonl")) for row in lines(file)]

    def pictures(self) -> dict[str, dict]:
        """The draw rows by key, in the order of the keys; of two with one key the last."""
        found = {row["key"]: row for row in self.rows if row["kind"] == "picture"}
        return {key: found[key] for key in sorted(found)}

    def scores(self, scorer: str) -> dict[str, dict]:
        """A scorer's rows by key."""
        return {row["key"]: row for row in self.rows if row["kind"] == "score" and row["scorer"] == scorer}

    def expected(self) -> int:
        """How many pictures the whole run has."""
        per_method = sum(told["count"] for told in self.settings["sets"].values()) * self.settings["images"]
        return per_method * len(self.settings["methods"])

    def gather(self, path: Path) -> None:
        """Write the run into one file: settings, processes, and a line per picture and score."""
        head = [{"kind": "run", "settings": self.settings}]
        head += [{"kind": "scorer", "name": name, "settings": told} for name, told in self.scorers.items()]
        head += [row for row in self.rows if row["kind"] == "process"]
        scores = [self.scores(name).values() for name in self.scorers]
        every = [*head, *self.pictures().values(), *(row for rows in scores for row in rows)]
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(map(written, every))


def opened(folder: Path, settings: dict, prompts: dict[str, str], process: str) -> dict:
    """Start a run or take one up: write run.json and prompts.jsonl where something new stands in them.

    settings: under the keys of MERGED, tables that add to those of an earlier start; everything else must be as it was.
    prompts: text by "set/id". Returns the settings of the whole run. Raises UsageError where an earlier start had
    others.
    """
    path, settings = folder / "run.json", json.loads(json.dumps({"format": FORMAT} | settings))
    if path.exists():
        then = loaded(path)
        pairs = [(key, settings.get(key), then.get(key)) for key in settings | then if key not in MERGED]
        for part in MERGED:
            both = settings[part].keys() & then.get(part, {}).keys()
            pairs += [(f"{part[:-1]} {name}", settings[part][name], then[part][name]) for name in sorted(both)]
        for name, now, before in pairs:
            if now != before:
                found = f"{path} was made with {name} {shown(before)}, now it is {shown(now)}"
                raise UsageError(f"{found}; expected the same, or another folder")
        settings = then | {part: then[part] | settings[part] for part in MERGED}
        if settings == then:
            return settings
    folder.mkdir(parents=True, exist_ok=True)
    texts = known_prompts(folder) | prompts
    every = (written({"kind": "prompt", "key": key, "prompt": text}) for key, text in texts.items())
    create(folder / "prompts.jsonl", "".join(every), process)
    create(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n", process)
    return settings


def shown(value) -> str:
    """A setting in an error's line, at most 120 characters of it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def known_prompts(folder: Path) -> dict[str, str]:
    """The texts of a run by "set/id"."""
    path = folder / "prompts.jsonl"
    return {row["key"]: row["prompt"] for row in lines(path)} if path.exists() else {}
