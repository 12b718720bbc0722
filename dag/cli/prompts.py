"""What is to be drawn, from the command line and from files. Nothing here waits for torch."""

import argparse
import json


def prompts_of(args: argparse.Namespace) -> list[dict] | None:
    """What each report entry starts from: a prompt, and the seed and id of its line if it has them.

    None when neither --prompt nor --prompts was given.
    """
    if args.prompt is None and args.prompts is None:
        return None
    prompts = [{"prompt": text} for text in args.prompt or []]
    if args.prompts is not None:
        try:
            lines = args.prompts.read_text(encoding="utf-8-sig").split("\n")
        except OSError as e:
            raise ValueError(
                f"{args.prompts}: cannot be read ({e.strerror}); expected a text file, one prompt per line"
            ) from e
        except UnicodeDecodeError as e:
            raise ValueError(f"{args.prompts}: is not UTF-8 text; expected one prompt per line") from e
        lines = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
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
