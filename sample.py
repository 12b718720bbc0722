"""Draw pictures from text with Stable Diffusion 1.4, or with the miniature that comes along, safely.

  python sample.py                                  four prompts on the miniature
  python sample.py --prompt "a red circle"          your own
  python sample.py --ckpt sd-v1-4.ckpt              the real model

Pictures, a contact sheet and report.json go to --out.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path


class UsageError(ValueError):
    """A wrong argument: one line, exit status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message} (--help shows all options)")


def number(kind: type, low: float, high: float):
    """A parser of numbers from low to high; NaN and infinity are refused."""

    def parse(text: str):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"'{text}' is not a number of the right kind ({kind.__name__})") from None
        if not low <= value <= high:  # false for NaN too
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {low:g} to {high:g}")
        return value

    return parse


def side(text: str) -> int:
    value = number(int, 64, 4096)(text)
    if value % 64:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 64, try {max(64, round(value / 64) * 64)}")
    return value


SHEET = 64  # rows of the contact sheet at most
METHODS = ("none", "dag", "dag-sld")


def methods_of(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"unknown method '{name}', expected a list of {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, metavar="FILE", help="SD 1.x checkpoint, .ckpt or .safetensors (default: the miniature)")
    add("--verify", action="store_true", help="hash the --ckpt file and stop if it is not a published one")
    add("--prompt", action="append", metavar="TEXT", help="what to draw; may be given several times")
    add("--prompts", type=Path, metavar="FILE", help="a text file with one prompt a line")
    add("--steps", type=number(int, 1, 1000), default=50, help="denoising steps, 1 to 1000 (default: 50)")
    add("--scale", type=number(float, 0, 1000), help="guidance scale s_g (default: 7.5, miniature 5)")
    add("--seed", type=number(int, 0, 2**62), default=0, help="of the first picture of a prompt (default: 0)")
    add(
        "--n-images",
        type=number(int, 1, 10000),
        default=1,
        help="pictures a prompt; number i uses seed + i (default: 1)",
    )
    add(
        "--batch-size",
        type=number(int, 1, 1000),
        help="pictures drawn side by side (default: as many as make four of 512 x 512)",
    )
    add("--height", type=side, help="pixels, a multiple of 64 (default: 512, miniature 128)")
    add("--width", type=side, help="pixels, a multiple of 64 (default: 512, miniature 128)")
    add("--device", help="cpu, cuda, mps (default: cuda if there is one, else cpu)")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the networks (default: float16 on cuda, else float32)",
    )
    add("--guidance", type=methods_of, metavar="LIST", help=f"one column each: {', '.join(METHODS)} (default: dag)")
    add("--tokens", type=Path, action="append", metavar="FILE", help="guideline tokens of a concept; may be repeated")
    add("--safety-text", metavar="TEXT", help="what guidance pushes away from (default: the token file's)")
    add("--save-maps", action="store_true", help="also write A of every step, as .npy and as a picture")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="where the results go (default: out)")
    add("--debug", action="store_true", help="show tracebacks and what was ignored in the checkpoint")
    return parser.parse_args(argv)


def prompts_of(args: argparse.Namespace) -> list[str] | None:
    """All prompts asked for; None when neither --prompt nor --prompts was given."""
    if args.prompt is None and args.prompts is None:
        return None
    prompts = list(args.prompt or [])
    if args.prompts is not None:
        try:
            lines = args.prompts.read_text(encoding="utf-8").splitlines()
        except OSError as e:
            raise ValueError(
                f"{args.prompts}: cannot be read ({e.strerror}); expected a text file, one prompt a line"
            ) from e
        except UnicodeDecodeError as e:
            raise ValueError(f"{args.prompts}: is not UTF-8 text; expected one prompt a line") from e
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{args.prompts}: no prompts in it; expected one a line")
    return prompts


def writable(folder: Path) -> None:
    """Make the output folder and prove that files can be written there. Raises ValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise ValueError(f"{folder}: cannot be written to ({e.strerror}); choose another folder with --out") from e


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-") or "empty"


def open_model(args: argparse.Namespace):
    """Load what --ckpt, --device and --dtype ask for; returns the model, the device and the dtype's name."""
    import torch  # here, not at the top: it takes seconds, --help should not

    import dag

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = args.dtype or ("float16" if device.startswith("cuda") else "float32")
    try:
        torch.zeros(1, device=device)
    except Exception as e:  # every backend has its own
        reason = (str(e).splitlines() or [type(e).__name__])[0][:80]
        raise UsageError(f"--device {device}: not available here ({reason}); try --device cpu") from e
    return dag.load(args.ckpt, device, getattr(torch, name)), device, name


def verify(args: argparse.Namespace) -> None:
    """Say under which name --ckpt was published. Raises CheckpointError if it was not."""
    from tqdm import tqdm

    from weights import known

    if args.ckpt is None:
        raise UsageError("--verify needs --ckpt; the miniature comes with the project")
    if not args.ckpt.is_file():
        return  # loading says what is wrong
    with tqdm(
        total=args.ckpt.stat().st_size, desc="sha256", unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:
        name = known.verify(args.ckpt, bar.update)
    print(f"{args.ckpt}: the published {name}, by its sha256")


def guidance_of(name: str, sd, tokens, safety_text: str | None):
    """The method of a column."""
    import dag

    if name == "none":
        return dag.CFG()
    return dag.DAG(*tokens, safety_text=safety_text, base="sld" if name == "dag-sld" else "sega")


def tokens_for(args: argparse.Namespace, sd):
    """The guideline tokens: the files', or the miniature's own, or the plain text's with a warning."""
    import dag
    from dag.model import MINIATURE

    files = args.tokens or ([MINIATURE.with_name("red-circle.safetensors")] if args.ckpt is None else [])
    tokens = [dag.GuidelineTokens.load(file) for file in files]
    for concept in tokens:
        if message := concept.check(sd):
            warn(message)
    if tokens:
        return tokens
    warn(
        f"tokens of '{sd.config.concept}' that were not optimised detect poorly; make some: `python train_tokens.py "
        f"--ckpt {args.ckpt} --data DIR --concept '{sd.config.concept}' --out FILE` and pass --tokens FILE"
    )
    return [dag.GuidelineTokens.from_text(sd, sd.config.concept, sd.config.safety_text)]


def run(args: argparse.Namespace) -> int:
    prompts = prompts_of(args)
    writable(args.out)

    from tqdm import tqdm

    from dag import drawing, pictures

    if args.verify:
        verify(args)
    sd, device, dtype = open_model(args)
    cfg = sd.config
    if args.ckpt is not None:
        print(f"{args.ckpt}: {sd.origin}")
    if device == "cpu" and dtype == "float16":
        warn("float16 is many times slower than float32 on a CPU; try --dtype bfloat16 or float32")
    if args.debug:
        print(f"{cfg.name}, ignored in the checkpoint: {', '.join(sd.ignored) or 'nothing'}")
    methods = args.guidance or (["none", "dag"] if args.ckpt is None and prompts is None else ["dag"])
    prompts = list(cfg.prompts) if prompts is None else prompts
    scale = cfg.scale if args.scale is None else args.scale
    size = args.height or cfg.size, args.width or cfg.size
    for prompt in prompts:
        if dropped := sd.text.dropped(prompt):
            warn(f"prompt longer than {cfg.text.max_length} tokens, dropped: '{dropped}'")
        if unknown := sd.text.unknown(prompt):
            warn(f"{cfg.name} was not taught: {', '.join(unknown)}; it knows {', '.join(sd.text.words())}")
    tokens = tokens_for(args, sd) if methods != ["none"] else []
    if tokens and args.steps <= cfg.dag.warmup:
        warn(f"--steps {args.steps} is not more than the warm-up of {cfg.dag.warmup} steps: nothing will be guided")

    settings = {
        "model": str(args.ckpt or cfg.name), "origin": sd.origin, "steps": args.steps, "scale": scale,
        "height": size[0], "width": size[1], "device": device, "dtype": dtype, "tokens": [c.concept for c in tokens],
        "safety_text": args.safety_text,
    }  # fmt: skip
    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.n_images)]
    batch = args.batch_size or max(1, 4 * 512 * 512 // (size[0] * size[1]))
    report, rows, status = [], [], 0
    try:
        for start in range(0, len(jobs), batch):
            part = jobs[start : start + batch]
            columns = []
            for method in methods:
                guidance = guidance_of(method, sd, tokens, args.safety_text)
                title = f"{method}, pictures {start + 1} to {start + len(part)} of {len(jobs)}"
                bar = partial(tqdm, desc=title, total=args.steps, unit="step", leave=False)
                columns.append(drawing.draw(sd, part, method, guidance, args.steps, scale, size, bar))
            for k, row in enumerate(zip(*columns, strict=True)):
                report += [save(d, start + k, args, settings, cfg.dag, len(methods) > 1) for d in row]
                rows.append(row)
    except KeyboardInterrupt:
        done = f"{len(report)} of {len(jobs) * len(methods)} pictures were finished and stay in {args.out}"
        print(f"\ninterrupted: {done}", file=sys.stderr)
        status = 130
    if rows:
        pictures.save_png(drawing.sheet(rows[:SHEET], cfg.dag), args.out / "contact.png")
    content = json.dumps({"settings": settings, "pictures": report}, indent=1, ensure_ascii=False)
    temporary = args.out / "report.json.tmp"
    temporary.write_text(content + "\n", encoding="utf-8")
    os.replace(temporary, args.out / "report.json")
    if status == 0:
        for found in (d for row in rows for d in row if d.maps is not None):
            print(found.words(" or ".join(c.concept for c in tokens), cfg.dag))
        print(f"{len(report)} pictures, {args.out / 'contact.png'} and {args.out / 'report.json'}")
    return status


def save(drawing, number: int, args: argparse.Namespace, settings: dict, cfg, several: bool) -> dict:
    """Write a picture, and its maps if asked for; returns its entry of the report."""
    import numpy as np

    from dag.pictures import save_png, strip

    name = f"{number:03d}-{slug(drawing.prompt)}" + (f"-{drawing.method}" if several else "")
    entry = {"prompt": drawing.prompt, "seed": drawing.seed, "file": f"{name}.png", "guidance": drawing.method}
    entry |= {"unet_rows": drawing.rows, "seconds": round(drawing.seconds, 3)} | drawing.findings(cfg)
    save_png(drawing.image, args.out / f"{name}.png", {"settings": json.dumps(settings | entry)})
    if args.save_maps and drawing.maps is not None:
        with open(args.out / f"{name}-maps.npy.tmp", "wb") as file:
            np.save(file, drawing.maps.numpy())
        os.replace(args.out / f"{name}-maps.npy.tmp", args.out / f"{name}-maps.npy")
        save_png(strip(drawing.maps), args.out / f"{name}-maps.png")
    return entry


def guarded(program: str, run: Callable[[], int], argv: list[str] | None) -> int:
    """Run a program; every expected failure becomes one line and an exit status: 2 usage, 1 data, 130 Ctrl-C."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        return run()
    except UsageError as e:
        if debug:
            raise
        code, message = 2, str(e)
    except (ValueError, ArithmeticError, OSError) as e:
        if debug:
            raise
        code, message = 1, str(e)
    except KeyboardInterrupt:
        code, message = 130, "interrupted, nothing was written"
    except Exception as e:  # out of memory, a driver's error: not ours to foresee
        if debug:
            raise
        code, message = 1, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]} (--debug shows where)"
    print(f"{program}: {message}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    return guarded("sample.py", lambda: run(arguments(argv)), argv)


if __name__ == "__main__":
    sys.exit(main())
