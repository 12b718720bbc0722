"""Draw pictures from text with Stable Diffusion 1.4, or with the miniature that comes along, safely.

  python sample.py                                  four prompts on the miniature, unguided and guided
  python sample.py --prompt "a red circle"          your own
  python sample.py --ckpt sd-v1-4.ckpt              the real model
  python sample.py --detect picture.png             no drawing: is the concept in this picture, and where?

Pictures, a contact sheet and report.json go to --out.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from dag.cli.parsing import Parser, UsageError, changed, given, guarded, methods, number, option, side, warn
from dag.cli.prompts import prompts_of
from dag.config import ATTENTIONS, METHODS, SD14, SHAPES, SIDE, STEPS

SHEET = 64  # pictures per method that the contact sheet shows at most
LEVELS = (61, 101, 201)  # timesteps at which --detect looks: with more noise, a missing caption costs more


def parser() -> Parser:
    parser = Parser("sample.py", __doc__)
    add = parser.add_argument
    parser.add_model()
    add("--verify", action="store_true", help="hash the --ckpt file and stop if it is not a published one")
    add("--prompt", action="append", metavar="TEXT", help="what to draw; may be given several times")
    lines = 'one prompt per line, or .jsonl: {"prompt": TEXT} per line and, if you like, a "seed" and an "id"'
    add("--prompts", type=Path, metavar="FILE", help=f"a text file, {lines}")
    add("--steps", type=number(int, 1, 1000), default=STEPS, help=f"denoising steps, 1 to 1000 (default: {STEPS})")
    scales = f"{SD14.scale:g}, miniature {SHAPES.scale:g}"
    add("--scale", type=number(float, 0, 1000), help=f"guidance scale s_g (default: {scales})")
    add("--seed", type=number(int, 0, 2**62), default=0, help="of the first picture of each prompt (default: 0)")
    add("--n-images", type=number(int, 1, 10000), default=1, help="per prompt; number i uses seed + i (default: 1)")
    add(
        "--batch-size",
        type=number(int, 1, 1000),
        help="drawn side by side (default: as many pixels as four of 512 x 512)",
    )
    for name in ("--height", "--width"):
        add(name, type=side, help=f"pixels, a multiple of {SIDE} (default: {SD14.size}, miniature {SHAPES.size})")
    implementations = (
        "maps by PyTorch (plain) or the Triton kernel (fused); auto: what a trial on the GPU favours, once"
    )
    add("--attention", choices=ATTENTIONS, default="auto", help=implementations)
    waits = "the first steps wait some minutes for it; worth it for many pictures"
    add("--compile", action="store_true", help=f"run the UNet through torch.compile: {waits}")
    columns = f"a column for each: {', '.join(METHODS)} (default: dag; without --ckpt and prompts: none,dag)"
    add("--guidance", type=methods, metavar="LIST", help=columns)
    beside = "guideline tokens of a concept; may be repeated (default: those beside the --ckpt that were made of it)"
    add("--tokens", type=Path, action="append", metavar="FILE", help=beside)
    authors = "; sld-*: its authors' own 20 concepts, but for the miniature, which does not know the words"
    add("--safety-text", metavar="TEXT", help=f"what guidance pushes away from (default: the token file's{authors})")
    add("--detect", type=Path, metavar="PICTURE", help="draw nothing; say what the tokens see in this picture")
    add("--save-maps", action="store_true", help="also write A of every step, as .npy and as a picture")
    page = "also write index.html, one file to move through the steps (default: without arguments that change pictures)"
    add("--page", action=argparse.BooleanOptionalAction, help=page)
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="where the results go (default: out)")
    add("--resume", action="store_true", help="draw what is missing in --out of a run with the same settings")
    parser.add_constants()
    return parser


def run(args: argparse.Namespace) -> int:
    prompts = prompts_of(args)
    import dag
    from dag.cli import expected, pictures, report, setup
    from dag.cli.drawing import draw, too_large
    from dag.cli.page import PICTURES, Page
    from dag.cli.records import Records
    from dag.evaluation.baselines import by_name, texts_for
    from dag.recording import Recording
    from kernels.choice import WithoutMaps

    setup.writable(args.out)
    sd, device, dtype = setup.open_model(args)
    cfg = sd.config
    names = args.guidance or (["none", "dag"] if args.ckpt is None and prompts is None else ["dag"])
    prompts = [{"prompt": text} for text in cfg.prompts] if prompts is None else prompts
    scale = cfg.scale if args.scale is None else args.scale
    size = args.height or cfg.size, args.width or cfg.size
    for prompt in prompts:
        setup.check_text(sd, "prompt", prompt["prompt"])
    if args.safety_text is not None:
        if not args.safety_text.strip():
            raise UsageError("--safety-text is empty: there is nothing to push away from; leave it out")
        setup.check_text(sd, "--safety-text", args.safety_text)
    looks = any(name.startswith("dag") for name in names)
    if not looks and (turned := given(args)):
        raise UsageError(f"{option(turned[0])}: --guidance {','.join(names)} has no DAG; leave it out")
    tokens = setup.tokens_for(args, sd) if args.tokens or looks else []
    constants = setup.constants(args, cfg.dag, tokens[0][0]) if looks else cfg.dag
    concepts = [c for c, _ in tokens]
    if args.safety_text is not None:
        concepts = [replace(c, safety_text=args.safety_text) for c in concepts]
    own = list(dict.fromkeys(c.safety_text for c in concepts)) or [args.safety_text or cfg.safety_text]
    fused, attention = setup.attention(args.attention, sd, concepts)
    blind = [WithoutMaps(sd.unet, concepts, fused)] if fused and concepts else []
    if args.compile:
        print(
            "--compile: the first step, and the first that is guided, wait for torch.compile, minutes in all",
            flush=True,
        )
        setup.compile_unet(sd)
    guidances = {
        name: by_name(name, own if args.safety_text else texts_for(name, own, cfg), concepts, constants, fused)
        for name in names
    }
    for name, guidance in guidances.items():
        warmup = constants.warmup if name.startswith("dag") else getattr(guidance, "warmup", 0)
        if args.steps <= warmup:
            warn(f"--steps {args.steps} is not more than {name}'s warm-up of {warmup} steps: nothing will be guided")
    if args.save_maps and not any(guidance.tokens for guidance in guidances.values()):
        warn(f"--save-maps: --guidance {','.join(names)} has no maps, nothing to save")

    settings = {
        "model": str(args.ckpt or cfg.name), "overlay": args.overlay and str(args.overlay), "origin": sd.origin,
        "steps": args.steps, "scale": scale,
        "height": size[0], "width": size[1], "seed": args.seed, "n_images": args.n_images,
        "device": device, "dtype": dtype, "attention": attention, "compile": args.compile, "guidance": names,
        "tokens": [
            {
                "concept": c.concept, "file": None if file is None else str(file),
                "min_area": c.adapt(constants.scaling).min_area,
            }
            for c, file in tokens
        ],
        "safety_texts": {name: list(g.safety_texts or filter(None, [g.uncond_text])) for name, g in guidances.items()},
        "dag": asdict(constants) if looks else None, "save_maps": args.save_maps,
    }  # fmt: skip
    jobs = [job | {"seed": job.get("seed", args.seed) + i} for job in prompts for i in range(args.n_images)]
    records = Records(args.out, settings, jobs)
    if args.resume:
        records.resume()
    entries, todo = records.entries, records.missing()
    batch = args.batch_size or max(1, 4 * 512 * 512 // (size[0] * size[1]))
    resumed, known = bool(entries), sum(k not in todo for k, _ in entries)
    said, shown, status, done, halved = [], [], 0, 0, False
    demonstration = is_demonstration(args)
    page = Page(sd, concepts, constants, scale) if (demonstration if args.page is None else args.page) else None

    def column(name: str, guidance: dag.Guidance, part: list[int]) -> tuple[list[report.Drawing], Recording | None]:
        asked = [(jobs[k]["prompt"], jobs[k]["seed"]) for k in part]
        recording = Recording(sd, concepts, min(len(part), PICTURES - done)) if page and done < PICTURES else None
        hooks = [*([] if guidance.tokens else blind), *(recording.hooks if recording else [])]
        watch = recording.keep if recording else None
        title = f"{name}, pictures {done + 1} to {done + len(part)} of {len(todo)}"
        return draw(sd, asked, name, guidance, args.steps, scale, size, hooks, title, watch), recording

    try:
        while done < len(todo):
            part, columns = todo[done : done + batch], []
            try:
                for m, (name, guidance) in enumerate(guidances.items()):
                    drawings, recording = column(name, guidance, part)
                    columns.append(drawings)
                    for k, drawing in zip(part, drawings, strict=True):
                        records.save(k, m, drawing)
                    if recording:
                        page.add(m, part[: recording.images], drawings, recording)
            except (RuntimeError, MemoryError) as e:
                if not setup.out_of_memory(e):
                    raise
                if len(part) == 1:
                    raise too_large(size, dtype, device) from e
                if not halved:
                    warn(f"out of memory with {len(part)} pictures side by side: halving that; see --batch-size")
                batch, halved = len(part) // 2, True
                continue
            records.write()  # as it goes, so that --resume finds what was drawn, whatever stops the run
            rows = [row for row in zip(*columns, strict=True) if not any(drawing.failed for drawing in row)]
            said += [drawing.words for row in rows for drawing in row if drawing.A is not None]
            shown += rows[: SHEET - len(shown)]
            done += len(part)
    except KeyboardInterrupt:
        message = f"{len(entries)} of {len(jobs) * len(names)} pictures were finished and stay in {args.out}"
        print(f"\ninterrupted: {message}; --resume draws the others", file=sys.stderr)
        status = 130
    finally:  # a picture that is finished is never lost, whatever stopped the next one
        contact = args.out / (f"contact-{todo[0]:03d}.png" if resumed and todo else "contact.png")
        index = contact.with_name(contact.name.replace("contact", "index")).with_suffix(".html")
        if shown:
            read = setup.judge() if args.ckpt is None and size == (cfg.size, cfg.size) else None  # it knows no others
            pictures.save_png(report.sheet(shown, read), contact)
        records.write()
        if page and page.pictures:
            page.write(index, records)
    if status == 0:
        for line in said:
            print(line)
        failed = sum("failed" in entry for entry in entries.values())
        cut = f" (its first {SHEET} rows)" if len(todo) > SHEET else ""
        before = f", {known} of them from before" if known else ""
        sheet = f", {index} to move through the steps" if page and page.pictures else ""
        sheet += f", {contact}{cut}" if shown else ""
        print(f"{len(entries) - failed} pictures{before}{sheet} and {records.path}")
        if demonstration:
            print(expected.compare([drawing.image for row in shown for drawing in row]))
        if any(file is None for _, file in tokens):
            setup.warn_untrained(args, sd)
        if failed:
            print(f"sample.py: {failed} of {len(entries)} pictures failed, see the warnings above", file=sys.stderr)
            status = 1
    return status


def is_demonstration(args: argparse.Namespace) -> bool:
    """Whether these arguments draw the very pictures that come with the project."""
    free = ("out", "device", "dtype", "attention", "compile", "batch_size", "save_maps", "page", "debug")
    return set(changed(args, parser().parse_args([]))) <= set(free)


def detect(args: argparse.Namespace) -> int:
    """What the tokens see in a picture: maps over it, a report, and a yes or no per concept."""
    looking = ("ckpt", "device", "dtype", "debug", "verify", "seed", "height", "width", "attention", "tokens", "detect")
    looking += ("out", "unsafe", "min_area", "overlay", "overlay_strength", "prediction")
    if useless := [name for name in changed(args, parser().parse_args([])) if name not in looking]:
        raise UsageError(f"--detect draws nothing: leave out {', '.join(map(option, useless))}")
    from PIL import Image, ImageOps

    import dag
    from dag.cli import setup
    from dag.cli.pictures import contact_sheet, from_pil, opened, overlay, save_png
    from dag.cli.report import place
    from dag.scalers import objects

    setup.writable(args.out)
    picture = ImageOps.exif_transpose(opened(args.detect))  # as a viewer shows it
    sd, device, dtype = setup.open_model(args)
    tokens = setup.tokens_for(args, sd)
    constants = setup.constants(args, sd.config.dag, tokens[0][0])
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
        scaling = c.adapt(constants.scaling)
        sizes = (objects(maps, scaling)[0] > 0).float().mean((1, 2))  # (levels,)
        yes = (sizes > 0).sum().item() > len(LEVELS) / 2
        where = place(maps, sizes, scaling)["place"] if sizes.any() else None
        shares = [round(share, 4) for share in sizes.tolist()]
        said = f"{c.concept}: {'yes, at the ' + where if yes else 'no'}"
        rows.append((said, [picture, *(overlay(picture, A) for A in maps)]))
        entry = {"concept": c.concept, "file": None if file is None else str(file), "detected": yes}
        entry |= {"unsafe": scaling.unsafe, "min_area": scaling.min_area}
        concepts.append(entry | {"place": where, "share": dict(zip(LEVELS, shares, strict=True))})
        print(f"{said}; share of the frame at t {LEVELS}: {shares}")
    save_png(contact_sheet(rows, ["picture", *(f"t {t}" for t in LEVELS)]), args.out / "detect.png")
    account = {"picture": str(args.detect), "model": str(args.ckpt or sd.config.name), "origin": sd.origin}
    account |= {"width": size[0], "height": size[1], "seed": args.seed, "device": device, "dtype": dtype}
    account["concepts"] = concepts
    setup.write_text(args.out / "detect.json", json.dumps(account, indent=1, ensure_ascii=False))
    print(f"{args.out / 'detect.png'} and {args.out / 'detect.json'}")
    if any(file is None for _, file in tokens):
        setup.warn_untrained(args, sd)
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
