"""Draw pictures from text with Stable Diffusion 1.4, or with the miniature that comes along, safely.

  python sample.py                                  four prompts on the miniature
  python sample.py --prompt "a red circle"          your own
  python sample.py --ckpt sd-v1-4.ckpt              the real model

Pictures, a contact sheet and report.json go to --out.
"""

import argparse
import json
import math
import os
import re
import sys
import time
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
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number of the right kind ({kind.__name__})") from None
        if not math.isfinite(value) or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {low:g} to {high:g}")
        return value

    return parse


def side(text: str) -> int:
    value = number(int, 64, 4096)(text)
    if value % 64:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 64, try {max(64, round(value / 64) * 64)}")
    return value


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, metavar="FILE", help="SD 1.x checkpoint, .ckpt or .safetensors (default: the miniature)")
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
    add("--height", type=side, help="pixels, a multiple of 64 (default: 512, miniature 128)")
    add("--width", type=side, help="pixels, a multiple of 64 (default: 512, miniature 128)")
    add("--device", help="cpu, cuda, mps (default: cuda if there is one, else cpu)")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the networks (default: float16 on cuda, else float32)",
    )
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


def run(args: argparse.Namespace) -> int:
    prompts = prompts_of(args)
    writable(args.out)

    import torch  # from here on it takes seconds
    from tqdm import tqdm

    import dag
    from dag import pictures

    cuda = torch.cuda.is_available()
    device = args.device or ("cuda" if cuda else "cpu")
    dtype = getattr(torch, args.dtype or ("float16" if device.startswith("cuda") else "float32"))
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UsageError(
            f"--device {device}: not available here ({str(e).splitlines()[0][:80]}); try --device cpu"
        ) from e
    sd = dag.load(args.ckpt, device, dtype)
    if args.debug:
        print(f"{sd.config.name}, ignored in the checkpoint: {', '.join(sd.ignored) or 'nothing'}")
    cfg = sd.config
    prompts = list(cfg.prompts) if prompts is None else prompts
    scale = cfg.scale if args.scale is None else args.scale
    height, width = args.height or cfg.size, args.width or cfg.size
    for prompt in prompts:
        if dropped := sd.text.dropped(prompt):
            warn(f"prompt longer than {cfg.text.max_length} tokens, dropped: '{dropped}'")
        if unknown := sd.text.unknown(prompt):
            warn(f"{cfg.name} was not taught: {', '.join(unknown)}; it knows {', '.join(sd.text.words())}")

    settings = {
        "model": str(args.ckpt or cfg.name), "steps": args.steps, "scale": scale, "height": height, "width": width,
        "device": device, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.n_images)]
    batch = max(1, 4 * 512 * 512 // (height * width))  # pictures drawn side by side
    report, drawn, status = [], [], 0
    try:
        for start in range(0, len(jobs), batch):
            part, began = jobs[start : start + batch], time.time()
            loop = dag.sample(
                sd, [p for p, _ in part], dag.CFG(), args.steps, scale, [s for _, s in part], height, width
            )
            rows = torch.zeros(len(part), dtype=torch.long)
            title = f"pictures {start + 1} to {start + len(part)} of {len(jobs)}"
            for step in tqdm(loop, title, args.steps, unit="step", leave=False):
                rows += step.rows
            images = [picture for x in step.x for picture in pictures.to_pil(sd.decode(x[None]))]
            for k, ((prompt, seed), image) in enumerate(zip(part, images, strict=True)):
                name = f"{start + k:03d}-{slug(prompt)}.png"
                entry = {"prompt": prompt, "seed": seed, "file": name, "guidance": "none", "unet_rows": int(rows[k])}
                entry["seconds"] = round((time.time() - began) / len(part), 3)
                pictures.save_png(image, args.out / name, {"settings": json.dumps(settings | entry)})
                report.append(entry)
                drawn.append(image)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: {len(report)} of {len(jobs)} pictures were finished and stay in {args.out}",
            file=sys.stderr,
        )
        status = 130
    if drawn:
        rows = [(" | ".join(p for p, _ in jobs[k : k + 4]), drawn[k : k + 4]) for k in range(0, len(drawn), 4)]
        pictures.save_png(pictures.contact_sheet(rows, []), args.out / "contact.png")
    content = json.dumps({"settings": settings, "pictures": report}, indent=1, ensure_ascii=False)
    temporary = args.out / "report.json.tmp"
    temporary.write_text(content + "\n", encoding="utf-8")
    os.replace(temporary, args.out / "report.json")
    if status == 0:
        print(f"{len(drawn)} pictures, {args.out / 'contact.png'} and {args.out / 'report.json'}")
    return status


def main(argv: list[str] | None = None) -> int:
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        return run(arguments(argv))
    except UsageError as e:
        code, message = 2, str(e)
        if debug:
            raise
    except (ValueError, ArithmeticError, OSError) as e:
        code, message = 1, str(e)
        if debug:
            raise
    except KeyboardInterrupt:
        code, message = 130, "interrupted: no pictures were finished"
    print(f"sample.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
