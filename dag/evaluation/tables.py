"""The command `table`: everything a run's rows tell, as Markdown, JSON and a picture; of the miniature also a sheet."""

import argparse
import json
from collections import Counter

from dag.cli.parsing import UsageError, warn
from weights.files import atomic_write

from .ledger import Run
from .statistics import Table


def run(args: argparse.Namespace) -> int:
    """Write table.md, table.json, table.png and, from a folder, rows.jsonl."""
    whole = Run.read(args.folder)
    lack = lacking(whole)
    if lack and not args.incomplete:
        raise UsageError(f"{args.folder}: {'; '.join(lack)}; draw and score what is missing, or give --incomplete")
    out = args.out or (args.folder if args.folder.is_dir() else args.folder.parent)
    out.mkdir(parents=True, exist_ok=True)
    if set(told["suite"] for told in whole.settings["sets"].values()) == {None}:
        from . import paper

        measured = paper.Measured(whole, args)
        tables, plot = paper.tables(measured), lambda path: paper.plot(measured, path)
    else:
        from . import miniature

        tables, plot = miniature.tables(whole), lambda path: miniature.plot(whole, path)
        if args.folder.is_dir():
            miniature.sheet(whole, out / "sheet.png")
    tables = [*tables, *about(whole)]
    head = ["# Evaluation", *([f"**Incomplete**: {'; '.join(lack)}."] if lack else [])]
    text = "\n\n".join([*head, *(table.markdown() for table in tables)]) + "\n"
    plain = {"settings": whole.settings, "incomplete": lack, "tables": [table.plain() for table in tables]}
    for name, content in (("table.md", text), ("table.json", json.dumps(plain, indent=1, ensure_ascii=False) + "\n")):
        with atomic_write(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    if args.folder.is_dir():
        whole.gather(out / "rows.jsonl")
    try:
        why = plot(out / "table.png")
    except ImportError:
        why = "matplotlib is missing; install it with: python -m pip install -e '.[evaluation]'"
    if why:
        warn(f"{out / 'table.png'}: not written, {why}")
    print(text, end="")
    return 0


def lacking(whole: Run) -> list[str]:
    """What is missing of a run: pictures, or scores of a set that a scorer has begun."""
    pictures, out = whole.pictures(), []
    if lack := whole.expected() - len(pictures):
        out.append(f"{lack} of {whole.expected()} pictures are missing")
    drawn = Counter(row["set"] for row in pictures.values() if row["file"] is not None)
    for name in whole.scorers:
        scored = Counter(pictures[key]["set"] for key in whole.scores(name) if key in pictures)
        for s, n in scored.items():
            if n < drawn[s]:
                out.append(f"{name} has seen {n} of {drawn[s]} pictures of {s}")
    return out


def about(whole: Run) -> list[Table]:
    """What has to be known of a run before its numbers are compared with others'."""
    settings = whole.settings
    lines = [[key, text(settings[key])] for key in settings if key not in ("sets", "methods", "format")]
    facts = [key for key in SET_FACTS if any(told.get(key) is not None for told in settings["sets"].values())]
    sets = [[name, *(text(told.get(key)) for key in facts)] for name, told in settings["sets"].items()]
    methods = [[name, text(told)] for name, told in settings["methods"].items()]
    scorers = [
        [name, text({k: v for k, v in told.items() if k != "reference"})] for name, told in whole.scorers.items()
    ]
    machines = Counter(
        ", ".join(f"{key} {row[key]}" for key in PROCESS_FACTS) for row in whole.rows if row["kind"] == "process"
    )
    return [
        Table("Settings", ["setting", "value"], lines),
        Table("Prompt sets", ["set", *facts], sets),
        Table("Methods' constants", ["method", "constants"], methods),
        *([Table("Scorers", ["scorer", "settings"], scorers)] if scorers else []),
        Table("Processes that drew", ["with", "processes"], [[told, n] for told, n in machines.items()]),
    ]


SET_FACTS = ("count", "file", "sha256", "variant", "rows", "categories", "drawn", "ids", "seeds", "scales")
PROCESS_FACTS = ("device", "device_name", "threads", "attention", "torch", "python", "code")


def text(value) -> str | None:
    """A setting in a cell."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False).replace("|", "\\|")
