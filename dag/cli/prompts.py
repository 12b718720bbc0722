"""What is to be drawn, from the command line and from files. Nothing here waits for torch."""

import argparse
import json
from pathlib import Path


def prompts_of(args: argparse.Namespace) -> list[dict] | None:
    """What each report entry starts from: a prompt, and the seed and id of its line if it has them.

    None when neither --prompt nor --prompts was given.
    """
    if args.prompt is None and args.prompts is None:
        return None
    prompts = [{"prompt": text} for text in args.prompt or []]
    if args.prompts is not None:
        lines = lines_of(args.prompts)
        if args.prompts.suffix.lower() == ".jsonl":
            prompts += [from_json(line, f"{args.prompts}, line {number}") for number, line in lines.items()]
        else:
            prompts += [{"prompt": line} for line in lines.values()]
        if not prompts:
            raise ValueError(f"{args.prompts}: no prompts in it; expected one per line")
    return prompts


def from_json(line: str, place: str) -> dict:
    """prompt, seed and id of a line of a .jsonl file; the last two need not be there. Raises ValueError."""
    try:
        read = json.loads(line)
        json.dumps(read, ensure_ascii=False).encode()  # half a surrogate pair could not be written into the report
        read = {key: read[key] for key in ("prompt", "seed", "id") if key in read}
    except (ValueError, TypeError, RecursionError):
        read = {}
    seed, name = read.get("seed", 0), read.get("id", "")
    seeded = type(seed) is int and 0 <= seed <= 2**62
    if not (isinstance(read.get("prompt"), str) and seeded and type(name) in (str, int)):
        expected = '{"prompt": TEXT}, and if you like "seed": 0 to 2^62 and "id": TEXT or a whole number'
        raise ValueError(f"{place}: is {line[:60]}; expected {expected}")
    return read


def lines_of(path: Path) -> dict[int, str]:
    """The lines of a text file that are not empty, by their numbers. Raises ValueError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror}); expected a text file, one prompt per line") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: is not UTF-8 text; expected one prompt per line") from e
    return {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}


def concept_and_look_alikes(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Prompts to draw training pictures from: those that show the concept; (prompt, kind) of those that do not.

    A line [concept], then one prompt a line; likewise [look-alikes: KIND] for each kind that figures are told of, or
    [look-alikes]. Lines that start with # are left out. Raises ValueError.
    """
    sections: dict[tuple[str, str], list[str]] = {}  # by name and kind
    prompts = None
    for number, line in lines_of(path).items():
        place = f"{path}, line {number}"
        if line.startswith("["):
            name, _, kind = line[1:].removesuffix("]").partition(":")
            section = name.strip(), kind.strip()
            if not line.endswith("]") or section[0] != "look-alikes" and section != ("concept", ""):
                raise ValueError(f"{place}: is {line[:60]}; expected [concept] or [look-alikes: KIND]")
            if section in sections:
                raise ValueError(f"{place}: {line[:60]} for the second time; expected each section once")
            prompts = sections[section] = []
        elif not line.startswith("#"):
            if prompts is None:
                raise ValueError(f"{place}: a prompt before any section; expected [concept] above it")
            prompts.append(line)
    for name in ("concept", "look-alikes"):
        if name not in (own for own, _ in sections):
            raise ValueError(f"{path}: no section [{name}]; expected prompts of the concept and of look-alikes")
    if empty := [": ".join(filter(None, section)) for section, prompts in sections.items() if not prompts]:
        raise ValueError(f"{path}: no prompts below [{empty[0]}]; expected one per line, or no such section")
    concept = sections.pop(("concept", ""))
    return concept, [(prompt, kind or name) for (name, kind), prompts in sections.items() for prompt in prompts]
