"""Draw pictures from text with Stable Diffusion 1.4, or with the miniature that comes along, safely.

  python sample.py                                  four prompts on the miniature, unguided and guided
  python sample.py --prompt "a red circle"          your own
  python sample.py --ckpt sd-v1-4.ckpt              the real model
  python sample.py --detect picture.png             no drawing: is the concept in this picture, and where?

Pictures, a contact sheet and report.json go to --out.
"""

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

from dag.cli.parsing import Parser, UsageError, guarded, methods, number, side, warn
from dag.config import METHODS, SD14, SHAPES, SIDE, STEPS

SHEET = 64  # pictures per method that the contact sheet shows at most
LEVELS = (101, 301, 501)  # timesteps at which --detect looks


def parser() -> Parser:
    parser = Parser("sample.py", __doc__)
    add = parser.add_argument
    parser.add_model()
    add("--verify", action="store_true", help="hash the --ckpt file and stop if it is not a published one")
    add("--prompt", action="append", metavar="TEXT", help="what to draw; may be given several times")
    add("--prompts", type=Path, metavar="FILE", help="a text file with one prompt per line")
    add("--steps", type=number(int, 1, 1000), default=STEPS, help=f"denoising steps, 1 to 1000 (default: {STEPS})")
    scales = f"{SD14.scale:g}, miniature {SHAPES.scale:g}"
    add("--scale", type=number(float, 0, 1000), help=f"guidance scale s_g (default: {scales})")
    add("--seed", type=number(int, 0, 2**62), default=0, help="of the first picture of each prompt (default: 0)")
    add("--n-images", type=number(int, 1, 10000), default=1, help="per prompt; number i uses seed + i (default: 1)")
    add("--batch-size", type=number(int, 1, 1000), help="drawn side by side (default: what makes four of 512 x 512)")
    for name in ("--height", "--width"):
        add(name, type=side, help=f"pixels, a multiple of {SIDE} (default: {SD14.size}, miniature {SHAPES.size})")
    choices = ("auto", "plain", "fused")
    implementations = "maps by PyTorch (plain) or the Triton kernel (fused); auto: what a trial on the GPU favours"
    add("--attention", choices=choices, default="auto", help=implementations)
    columns = f"a column for each: {', '.join(METHODS)} (default: dag; without --ckpt and prompts: none,dag)"
    add("--guidance", type=methods, metavar="LIST", help=columns)
    add("--tokens", type=Path, action="append", metavar="FILE", help="guideline tokens of a concept; may be repeated")
    add("--safety-text", metavar="TEXT", help="what guidance pushes away from (default: the token file's)")
    add("--detect", type=Path, metavar="PICTURE", help="draw nothing; say what the tokens see in this picture")
    add("--save-maps", action="store_true", help="also write A of every step, as .npy and as a picture")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="where the results go (default: out)")
    return parser


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
                f"{args.prompts}: cannot be read ({e.strerror}); expected a text file, one prompt per line"
            ) from e
        except UnicodeDecodeError as e:
            raise ValueError(f"{args.prompts}: is not UTF-8 text; expected one prompt per line") from e
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{args.prompts}: no prompts in it; expected one per line")
    return prompts


def run(args: argparse.Namespace) -> int:
    prompts = prompts_of(args)
    from tqdm import tqdm

    import dag
    from dag.cli import expected, pictures, report, setup
    from dag.evaluation.baselines import by_name
    from kernels.choice import WithoutMaps

    setup.writable(args.out)
    sd, device, dtype = setup.open_model(args)
    cfg = sd.config
    names = args.guidance or (["none", "dag"] if args.ckpt is None and prompts is None else ["dag"])
    prompts = list(cfg.prompts) if prompts is None else prompts
    scale = cfg.scale if args.scale is None else args.scale
    size = args.height or cfg.size, args.width or cfg.size
    for prompt in prompts:
        setup.check_text(sd, "prompt", prompt)
    if args.safety_text is not None:
        if not args.safety_text.strip():
            raise UsageError("--safety-text is empty: there is nothing to push away from; leave it out")
        setup.check_text(sd, "--safety-text", args.safety_text)
    tokens = setup.tokens_for(args, sd) if args.tokens or any(name.startswith("dag") for name in names) else []
    concepts = [c for c, _ in tokens]
    if args.safety_text is not None:
        concepts = [replace(c, safety_text=args.safety_text) for c in concepts]
    safety_texts = list(dict.fromkeys(c.safety_text for c in concepts)) or [args.safety_text or cfg.safety_text]
    fused, attention = setup.attention(args.attention, sd, concepts)
    blind = [WithoutMaps(sd.unet, concepts, fused)] if fused and concepts else []
    guidances = {name: by_name(name, safety_texts, concepts, fused) for name in names}
    for name, guidance in guidances.items():
        warmup = cfg.dag.warmup if name.startswith("dag") else getattr(guidance, "warmup", 0)
        if args.steps <= warmup:
            warn(f"--steps {args.steps} is not more than {name}'s warm-up of {warmup} steps: nothing will be guided")
    if args.save_maps and not any(guidance.tokens for guidance in guidances.values()):
        warn(f"--save-maps: --guidance {','.join(names)} has no maps, nothing to save")

    settings = {
        "model": str(args.ckpt or cfg.name), "origin": sd.origin, "steps": args.steps, "scale": scale,
        "height": size[0], "width": size[1], "seed": args.seed, "n_images": args.n_images,
        "device": device, "dtype": dtype, "attention": attention, "guidance": names,
        "tokens": [{"concept": c.concept, "file": None if f is None else str(f)} for c, f in tokens],
        "safety_texts": [] if names == ["none"] else safety_texts,
    }  # fmt: skip
    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.n_images)]
    batch = args.batch_size or max(1, 4 * 512 * 512 // (size[0] * size[1]))
    entries, said, shown, status = {}, [], [], 0  # entries of the report by number of the picture and of the method
    try:
        for start in range(0, len(jobs), batch):
            part, columns = jobs[start : start + batch], []
            for m, (name, guidance) in enumerate(guidances.items()):
                began, title = time.time(), f"{name}, pictures {start + 1} to {start + len(part)} of {len(jobs)}"
                texts, seeds = [text for text, _ in part], [seed for _, seed in part]
                hooks = [] if guidance.tokens else blind
                loop = dag.sample(sd, texts, guidance, args.steps, scale, seeds, *size, hooks=hooks)
                steps = list(tqdm(loop, title, args.steps, unit="step", leave=False, disable=None))
                columns.append(report.drawings(sd, part, name, guidance, steps, time.time() - began))
                for k, drawing in enumerate(columns[-1], start):
                    entries[k, m] = save(drawing, k, args, settings)
            rows = list(zip(*columns, strict=True))
            said += [drawing.words for row in rows for drawing in row if drawing.A is not None]
            shown += rows[: SHEET - len(shown)]
    except KeyboardInterrupt:
        done = f"{len(entries)} of {len(jobs) * len(names)} pictures were finished and stay in {args.out}"
        print(f"\ninterrupted: {done}", file=sys.stderr)
        status = 130
    finally:  # a picture that is finished is never lost, whatever stopped the next one
        if shown:
            read = setup.judge() if args.ckpt is None and size == (cfg.size, cfg.size) else None  # it knows no others
            pictures.save_png(report.sheet(shown, read), args.out / "contact.png")
        account = {"settings": settings, "pictures": [entries[key] for key in sorted(entries)]}
        setup.write_text(args.out / "report.json", json.dumps(account, indent=1, ensure_ascii=False))
    if status == 0:
        for line in said:
            print(line)
        cut = f" (its first {SHEET} rows)" if len(jobs) > SHEET else ""
        print(f"{len(entries)} pictures, {args.out / 'contact.png'}{cut} and {args.out / 'report.json'}")
        if is_demonstration(args):
            print(expected.compare([drawing.image for row in shown for drawing in row]))
    return status


def is_demonstration(args: argparse.Namespace) -> bool:
    """Whether these arguments draw the very pictures that come with the project."""
    free = ("out", "device", "dtype", "attention", "batch_size", "save_maps", "debug")
    own, default = vars(args), vars(parser().parse_args([]))
    return all(own[name] == default[name] for name in own if name not in free)


def save(drawing, number: int, args: argparse.Namespace, settings: dict) -> dict:
    """Write a picture, and its maps if asked for; returns its entry of the report."""
    import numpy as np

    from dag.cli.pictures import save_png, strip
    from weights.files import atomic_write

    slug = re.sub(r"[^a-z0-9]+", "-", drawing.prompt.lower())[:40].strip("-") or "empty"
    name = f"{number:03d}-{slug}" + (f"-{drawing.method}" if len(settings["guidance"]) > 1 else "")
    entry = {"prompt": drawing.prompt, "seed": drawing.seed, "file": f"{name}.png", "guidance": drawing.method}
    entry |= {"unet_rows": drawing.unet_rows, "seconds": round(drawing.seconds, 3)} | drawing.findings
    save_png(drawing.image, args.out / f"{name}.png", {"settings": json.dumps(settings | entry)})
    if args.save_maps and drawing.A is not None:
        maps = drawing.A.amax(1)  # (steps, H, W), the largest of all concepts'
        with atomic_write(args.out / f"{name}-maps.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, maps.numpy())
        save_png(strip(maps), args.out / f"{name}-maps.png")
    return entry


def detect(args: argparse.Namespace) -> int:
    """What the tokens see in a picture: maps over it, a report, and a yes or no per concept."""
    for_drawing = "prompt", "prompts", "guidance", "safety_text", "save_maps", "scale", "batch_size"
    if useless := [f"--{name.replace('_', '-')}" for name in for_drawing if getattr(args, name) not in (None, False)]:
        raise UsageError(f"--detect draws nothing: leave out {', '.join(useless)}")
    from PIL import Image, ImageOps, UnidentifiedImageError

    import dag
    from dag.cli import setup
    from dag.cli.pictures import contact_sheet, from_pil, overlay, save_png
    from dag.cli.report import place
    from dag.scalers import objects

    setup.writable(args.out)
    try:
        picture = ImageOps.exif_transpose(Image.open(args.detect)).convert("RGB")  # as a viewer shows it
    except FileNotFoundError as e:
        raise ValueError(f"{args.detect}: no such file; expected a picture, PNG or JPEG") from e
    except (UnidentifiedImageError, OSError) as e:
        raise ValueError(f"{args.detect}: not a readable picture; expected a PNG or JPEG file") from e
    sd, device, dtype = setup.open_model(args)
    tokens = setup.tokens_for(args, sd)
    ratio = (picture.width / picture.height) ** 0.5  # the model's own area, at the picture's ratio of sides
    near = [max(SIDE, round(sd.config.size * factor / SIDE) * SIDE) for factor in (ratio, 1 / ratio)]
    size = args.width or near[0], args.height or near[1]
    if picture.size != size:
        warn(f"{args.detect}: is {picture.width} x {picture.height} pixels, looked at as {size[0]} x {size[1]}")
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    rows, concepts = [], []
    for c, file in tokens:
        fused, _ = setup.attention(args.attention, sd, [c])
        maps = dag.detect(sd, c, from_pil(picture), LEVELS, args.seed, fused).cpu()  # (levels, H, W)
        scaling = c.adapt(sd.config.dag.scaling)
        sizes = (objects(maps, scaling)[0] > 0).float().mean((1, 2))  # (levels,)
        yes = (sizes > 0).sum().item() > len(LEVELS) / 2
        where = place(maps, sizes, scaling)["place"] if sizes.any() else None
        shares = [round(share, 4) for share in sizes.tolist()]
        said = f"{c.concept}: {'yes, at the ' + where if yes else 'no'}"
        rows.append((said, [picture, *(overlay(picture, A) for A in maps)]))
        entry = {"concept": c.concept, "file": None if file is None else str(file), "detected": yes}
        concepts.append(entry | {"place": where, "share": dict(zip(LEVELS, shares, strict=True))})
        print(f"{said}; share of the frame at t {LEVELS}: {shares}")
    save_png(contact_sheet(rows, ["picture", *(f"t {t}" for t in LEVELS)]), args.out / "detect.png")
    account = {"picture": str(args.detect), "model": str(args.ckpt or sd.config.name), "origin": sd.origin}
    account |= {"width": size[0], "height": size[1], "seed": args.seed, "device": device, "dtype": dtype}
    account["concepts"] = concepts
    setup.write_text(args.out / "detect.json", json.dumps(account, indent=1, ensure_ascii=False))
    print(f"{args.out / 'detect.png'} and {args.out / 'detect.json'}")
    return 0


def main(argv: list[str] | None = None) -> int:
    def program() -> int:
        args = parser().parse_args(argv)
        if args.verify:
            from dag.cli import setup

            setup.verify(args.ckpt)
        return detect(args) if args.detect is not None else run(args)

    return guarded("sample.py", program, argv)


if __name__ == "__main__":
    sys.exit(main())
