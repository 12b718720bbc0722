"""Draw pictures from text with Stable Diffusion 1.4, or with the miniature that comes along, safely.

  python sample.py                                  four prompts on the miniature
  python sample.py --prompt "a red circle"          your own
  python sample.py --ckpt sd-v1-4.ckpt              the real model
  python sample.py --detect picture.png             no drawing: is the concept in this picture, and where?

Pictures, a contact sheet and report.json go to --out.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
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


SHEET = 64  # pictures of a method that the contact sheet shows at most
METHODS = ("none", "negative", "sld-weak", "sld-medium", "sld-strong", "sld-max", "sega", "dag", "dag-sld")


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
    add(
        "--attention",
        choices=("auto", "plain", "fused"),
        default="auto",
        help="attention with guideline maps by PyTorch (plain) or the Triton kernel (fused); auto is plain for now",
    )
    add("--guidance", type=methods_of, metavar="LIST", help=f"one column each: {', '.join(METHODS)} (default: dag)")
    add("--tokens", type=Path, action="append", metavar="FILE", help="guideline tokens of a concept; may be repeated")
    add("--safety-text", metavar="TEXT", help="what guidance pushes away from (default: the token file's)")
    add("--detect", type=Path, metavar="PICTURE", help="draw nothing; say what the tokens see in this picture")
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


def check_text(sd, what: str, text: str) -> None:
    """Warn of words that do not fit or that the model was never taught."""
    if dropped := sd.text.dropped(text):
        warn(f"{what} longer than {sd.config.text.max_length} tokens, dropped: '{dropped}'")
    if unknown := sd.text.unknown(text):
        warn(f"{what}: {sd.config.name} was not taught {', '.join(unknown)}; it knows {', '.join(sd.text.words())}")


def write_text(path: Path, content: str) -> None:
    from dag.files import whole

    with whole(path) as temporary:
        temporary.write_text(content + "\n", encoding="utf-8")


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


def check_attention(choice: str, sd) -> None:
    from dag.attention import implementation

    try:
        implementation(choice, sd.device, sd.dtype)
    except ValueError as e:
        raise UsageError(f"--attention {choice}: {e}") from e


def tokens_for(args: argparse.Namespace, sd):
    """(tokens, their file) a concept: the files given, or the miniature's own, or the plain text's with a warning."""
    import dag
    from dag.model import MINIATURE

    files = args.tokens or ([MINIATURE.with_name("red-circle.safetensors")] if args.ckpt is None else [])
    tokens = [(dag.GuidelineTokens.load(file), file) for file in files]
    for concept, _ in tokens:
        if message := concept.check(sd):
            warn(message)
    if tokens:
        return tokens
    warn(
        f"tokens of '{sd.config.concept}' that were not optimised detect poorly; make some: `python train_tokens.py "
        f"--ckpt {args.ckpt} --data DIR --concept '{sd.config.concept}' --safety-text '{sd.config.safety_text}' "
        "--out FILE` and pass --tokens FILE"
    )
    return [(dag.GuidelineTokens.from_text(sd, sd.config.concept, sd.config.safety_text), None)]


def judge():
    """Writes down what the miniature's judge reads in a picture."""
    from dag.pictures import from_pil
    from weights.shapes.judge import Judge

    judge = Judge.load()

    def read(image) -> str:
        (seen,) = judge.read(from_pil(image))
        return ", ".join(f"{colour} {shape}" for colour, shape in seen) or "nothing"

    return read


def run(args: argparse.Namespace) -> int:
    prompts = prompts_of(args)
    writable(args.out)

    from tqdm import tqdm

    from dag import drawing, pictures
    from dag.guidance import named

    sd, device, dtype = open_model(args)
    check_attention(args.attention, sd)
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
        check_text(sd, "prompt", prompt)
    if args.safety_text is not None:
        if not args.safety_text.strip():
            raise UsageError("--safety-text is empty: there is nothing to push away from; leave it out")
        check_text(sd, "--safety-text", args.safety_text)
    tokens = tokens_for(args, sd) if args.tokens or any(m.startswith("dag") for m in methods) else []
    concepts = [c for c, _ in tokens]
    if args.safety_text is not None:
        concepts = [replace(c, safety_text=args.safety_text) for c in concepts]
    safety_texts = list(dict.fromkeys(c.safety_text for c in concepts)) or [args.safety_text or cfg.safety_text]
    guidances = {m: named(m, safety_texts, concepts, args.attention) for m in methods}
    for method, guidance in guidances.items():
        warmup = cfg.dag.warmup if method.startswith("dag") else getattr(guidance, "warmup", 0)
        if args.steps <= warmup:
            warn(f"--steps {args.steps} is not more than {method}'s warm-up of {warmup} steps: nothing will be guided")
    if args.save_maps and not any(m.startswith("dag") for m in methods):
        warn(f"--save-maps: --guidance {','.join(methods)} has no maps, nothing to save")

    settings = {
        "model": str(args.ckpt or cfg.name), "origin": sd.origin, "steps": args.steps, "scale": scale,
        "height": size[0], "width": size[1], "seed": args.seed, "n_images": args.n_images,
        "device": device, "dtype": dtype,
        "attention": args.attention, "guidance": methods,
        "tokens": [{"concept": c.concept, "file": None if f is None else str(f)} for c, f in tokens],
        "safety_texts": [] if methods == ["none"] else safety_texts,
    }  # fmt: skip
    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.n_images)]
    batch = args.batch_size or max(1, 4 * 512 * 512 // (size[0] * size[1]))  # pictures drawn side by side
    entries, said, shown, status = {}, {}, {}, 0  # by number of the picture and of the method
    try:
        for start in range(0, len(jobs), batch):
            part = jobs[start : start + batch]
            for m, (method, guidance) in enumerate(guidances.items()):
                title = f"{method}, pictures {start + 1} to {start + len(part)} of {len(jobs)}"
                bar = partial(tqdm, desc=title, total=args.steps, unit="step", leave=False)
                for k, d in enumerate(drawing.draw(sd, part, method, guidance, args.steps, scale, size, bar), start):
                    entries[k, m] = save(d, k, args, settings, cfg.dag, len(methods) > 1)
                    if d.maps is not None:
                        said[k, m] = d.words(cfg.dag)
                    if k < SHEET:
                        shown[k, m] = d
    except KeyboardInterrupt:
        done = f"{len(entries)} of {len(jobs) * len(methods)} pictures were finished and stay in {args.out}"
        print(f"\ninterrupted: {done}", file=sys.stderr)
        status = 130
    finally:  # a picture that is finished is never lost, whatever stopped the next one
        every = range(len(methods))
        rows = [tuple(shown[k, m] for m in every) for k in range(len(jobs)) if all((k, m) in shown for m in every)]
        if rows:
            read = judge() if args.ckpt is None and size == (cfg.size, cfg.size) else None  # it knows no other pictures
            pictures.save_png(drawing.sheet(rows, cfg.dag, read), args.out / "contact.png")
        report = {"settings": settings, "pictures": [entries[key] for key in sorted(entries)]}
        write_text(args.out / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    if status == 0:
        for key in sorted(said):
            print(said[key])
        cut = f" (its first {SHEET} rows)" if len(jobs) > SHEET else ""
        print(f"{len(entries)} pictures, {args.out / 'contact.png'}{cut} and {args.out / 'report.json'}")
    return status


LEVELS = (101, 301, 501)  # timesteps at which --detect looks


def detect(args: argparse.Namespace) -> int:
    """What the tokens see in a picture: maps over it, a report, and a yes or no a concept."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    import dag
    from dag.drawing import place
    from dag.pictures import contact_sheet, from_pil, overlay, save_png
    from dag.scalers import objects

    for_drawing = "prompt", "prompts", "guidance", "safety_text", "save_maps", "scale", "batch_size"
    if useless := [f"--{name.replace('_', '-')}" for name in for_drawing if getattr(args, name) not in (None, False)]:
        raise UsageError(f"--detect draws nothing: leave out {', '.join(useless)}")
    writable(args.out)
    try:
        picture = ImageOps.exif_transpose(Image.open(args.detect)).convert("RGB")  # as a viewer shows it
    except FileNotFoundError as e:
        raise ValueError(f"{args.detect}: no such file; expected a picture, PNG or JPEG") from e
    except (UnidentifiedImageError, OSError) as e:
        raise ValueError(f"{args.detect}: not a readable picture; expected a PNG or JPEG file") from e
    sd, device, dtype = open_model(args)
    check_attention(args.attention, sd)
    shape = (picture.width / picture.height) ** 0.5  # the area of the model's own size, the sides' ratio of the picture
    near = [max(64, round(sd.config.size * factor / 64) * 64) for factor in (shape, 1 / shape)]
    size = args.width or near[0], args.height or near[1]
    if picture.size != size:
        warn(f"{args.detect}: is {picture.width} x {picture.height} pixels, looked at as {size[0]} x {size[1]}")
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    rows, concepts = [], []
    for tokens, file in tokens_for(args, sd):
        maps = dag.detect(sd, tokens, from_pil(picture), list(LEVELS), args.seed, args.attention)  # (levels, H, W)
        scaling = tokens.scaling(sd.config.dag.scaling)
        shares = [round(objects(A, scaling)[1].sum().item(), 4) for A in maps]
        seen = place(maps, scaling)
        yes = seen["steps"] > len(LEVELS) / 2
        said = f"{tokens.concept}: {'yes, at the ' + seen['place'] if yes else 'no'}"
        rows.append((said, [picture, *(overlay(picture, A) for A in maps)]))
        entry = {"concept": tokens.concept, "file": None if file is None else str(file), "detected": yes}
        concepts.append(entry | {"place": seen.get("place"), "share": dict(zip(LEVELS, shares, strict=True))})
        print(f"{said}; share of the frame at t {LEVELS}: {shares}")
    save_png(contact_sheet(rows, ["picture", *(f"t {t}" for t in LEVELS)]), args.out / "detect.png")
    report = {"picture": str(args.detect), "model": str(args.ckpt or sd.config.name), "origin": sd.origin}
    report |= {"width": size[0], "height": size[1], "seed": args.seed, "device": device, "dtype": dtype}
    write_text(args.out / "detect.json", json.dumps(report | {"concepts": concepts}, indent=1, ensure_ascii=False))
    print(f"{args.out / 'detect.png'} and {args.out / 'detect.json'}")
    return 0


def save(drawing, number: int, args: argparse.Namespace, settings: dict, cfg, several: bool) -> dict:
    """Write a picture, and its maps if asked for; returns its entry of the report."""
    import numpy as np

    from dag.files import whole
    from dag.pictures import save_png, strip

    name = f"{number:03d}-{slug(drawing.prompt)}" + (f"-{drawing.method}" if several else "")
    entry = {"prompt": drawing.prompt, "seed": drawing.seed, "file": f"{name}.png", "guidance": drawing.method}
    entry |= {"unet_rows": drawing.rows, "seconds": round(drawing.seconds, 3)} | drawing.findings(cfg)
    save_png(drawing.image, args.out / f"{name}.png", {"settings": json.dumps(settings | entry)})
    if args.save_maps and drawing.maps is not None:
        with whole(args.out / f"{name}-maps.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, drawing.A.numpy())
        save_png(strip(drawing.A), args.out / f"{name}-maps.png")
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
        code, message = 130, "interrupted"
    except Exception as e:  # out of memory, a driver's error: not ours to foresee
        if debug:
            raise
        code, message = 1, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]} (--debug shows where)"
    print(f"{program}: {message}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    def either() -> int:
        args = arguments(argv)
        if args.verify:
            verify(args)
        return detect(args) if args.detect is not None else run(args)

    return guarded("sample.py", either, argv)


if __name__ == "__main__":
    sys.exit(main())
