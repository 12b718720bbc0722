"""Scoring a run: the pictures that a scorer has not seen, divided among the processes, and a row for each."""

import argparse
import json
from pathlib import Path

from dag.cli.parsing import UsageError

from . import ledger
from .__main__ import scorer


def run(args: argparse.Namespace) -> int:
    """Each scorer, one after the other. Ends before anything is loaded where nothing is missing."""
    k, n = ledger.rank()
    args.process = ledger.process_name()
    for name in args.scorers:
        whole = ledger.Run.read(args.folder)
        pictures = {key: row for key, row in whole.pictures().items() if row["file"] is not None}
        if args.sets is not None:
            wanted = [part.strip() for part in args.sets.split(",")]
            if unknown := [part for part in wanted if part not in whole.settings["sets"]]:
                found = ", ".join(whole.settings["sets"])
                raise UsageError(f"--sets: the run has no set '{unknown[0]}'; expected a list of {found}")
            pictures = {key: row for key, row in pictures.items() if row["set"] in wanted}
        there = whole.scores(name)
        if mine := [row for row in list(pictures.values())[k::n] if row["key"] not in there]:
            score(args, name, mine)
        if k == 0:
            scored = ledger.Run.read(args.folder).scores(name).keys() & pictures.keys()
            lack = len(pictures) - len(scored)
            more = f"; {lack} are missing: start again once all processes have ended" if lack else ""
            print(f"{args.folder}: {name} of {len(scored)} of {len(pictures)} pictures{more}")
    return 0


def score(args: argparse.Namespace, name: str, todo: list[dict]) -> None:
    """Score pictures, a batch at a time, and write their rows. Raises UsageError for other settings than before."""
    made = scorer(name).Scorer(args)
    settle(args.folder / "rows" / f"{name}.json", made.settings, args.process)
    texts, rows = ledger.known_prompts(args.folder), ledger.Rows(args.folder, name, args.process)
    for at in range(0, len(todo), made.batch):
        part = [row | {"prompt": texts[f"{row['set']}/{row['id']}"]} for row in todo[at : at + made.batch]]
        told = made.score([args.folder / row["file"] for row in part], part)
        for row, values in zip(part, told, strict=True):
            rows.append({"kind": "score", "scorer": name, "key": row["key"]} | values)
    rows.close()


def settle(path: Path, settings: dict, process: str) -> None:
    """Write a scorer's settings, or compare them with those of an earlier start: REFERENCE may differ by rounding."""
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        ledger.create(path, json.dumps(settings, ensure_ascii=False) + "\n", process)
        return
    then = ledger.loaded(path)
    for key in settings | then:
        if key != "reference" and settings.get(key) != then.get(key):
            found = f"{path} has {key} {ledger.shown(then.get(key))}, now it is {ledger.shown(settings.get(key))}"
            expected = f"delete rows/{path.stem}* to score all pictures anew"
            raise UsageError(f"{found}; expected the same: {expected}")
