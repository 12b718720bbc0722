"""Optimise guideline tokens, the detector of one concept, from a few annotated pictures.

  python train_tokens.py --out red-circle.safetensors    the miniature's concept, on 5 + 3 pictures it draws itself
  python train_tokens.py --ckpt sd-v1-4.ckpt --data DIR --concept "nude person" \\
      --safety-text "nude, nudity, naked, sexual" --out nudity.safetensors

DIR holds NAME.png and NAME.mask.png (white where the concept is; no mask file: a safe picture), and optionally
captions.json: {"NAME.png": "its prompt"} or {"NAME.png": {"prompt": "...", "seed": 3}}. With seeds for all pictures the
queries are read along the trajectories they were drawn on, as in the paper, else from the pictures with noise added.
A run that was stopped goes on from OUT.state when the same command is given again.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from sample import Parser, UsageError, check_text, guarded, number, open_model, warn, writable

HELD_OUT = 20  # pictures of each kind that the miniature's tokens are measured on


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="train_tokens.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, metavar="FILE", help="SD 1.x checkpoint (default: the miniature)")
    add("--data", type=Path, metavar="DIR", help="annotated pictures (default, miniature only: drawn on the spot)")
    add("--concept", metavar="TEXT", help='text the tokens start from (default: "a red circle" on the miniature)')
    add("--safety-text", metavar="TEXT", help="what guidance will push away from (default: the concept text)")
    add("--recipe", choices=("default", "paper"), default="default", help="ours or the paper's (default: default)")
    add("--n-unsafe", type=number(int, 1, 1000), default=5, help="unsafe pictures to draw without --data (default: 5)")
    add("--n-safe", type=number(int, 0, 1000), default=3, help="safe pictures to draw without --data (default: 3)")
    add("--steps", type=number(int, 1, 100000), help="optimisation steps (default: 1500; paper: 100 an unsafe picture)")
    add(
        "--min-area",
        type=number(float, 0, 1),
        metavar="SHARE",
        help="drop finds below this share of the frame (default: the model's)",
    )
    add("--safe-weight", type=number(float, 0, 1000), default=1.0, help="of safe pictures in the loss (default: 1)")
    add("--seed", type=number(int, 0, 2**62), default=0, help="of pictures and optimisation (default: 0)")
    add("--device", help="cpu, cuda, mps (default: cuda if there is one, else cpu)")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the networks (default: float16 on cuda, else float32)",
    )
    add("--out", type=Path, default=Path("out/tokens.safetensors"), metavar="FILE", help="token file to write")
    add("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def read_folder(folder: Path, sd):
    """DIR -> pictures (N, 3, height, width) in [-1, 1], masks (N, H, W) in [0, 1], prompts, seeds or None."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image, UnidentifiedImageError

    from dag.pictures import from_pil

    def opened(path: Path) -> Image.Image:
        try:
            picture = Image.open(path)
            picture.load()
            return picture
        except (UnidentifiedImageError, OSError) as e:
            raise ValueError(f"{path}: not a readable picture; expected a PNG file") from e

    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with NAME.png and NAME.mask.png")
    names = sorted(p.name for p in folder.glob("*.png") if not p.name.endswith(".mask.png"))
    for mask in sorted(folder.glob("*.mask.png")):
        if mask.name.replace(".mask.png", ".png") not in names:
            raise ValueError(f"{mask}: a mask without its picture; expected {mask.name.replace('.mask.png', '.png')}")
    if not names:
        raise ValueError(f"{folder}: no pictures in it; expected NAME.png and NAME.mask.png")
    pictures, masks, sizes = [], [], {}
    for name in names:
        picture, mask_path = opened(folder / name), folder / name.replace(".png", ".mask.png")
        sizes[picture.size] = name
        if len(sizes) > 1:
            raise ValueError(
                f"{folder / name}: {picture.size[0]} x {picture.size[1]} pixels, the others are not; expected one size"
            )
        if picture.width % 64 or picture.height % 64:
            raise ValueError(f"{folder / name}: {picture.width} x {picture.height} pixels; expected multiples of 64")
        mask = torch.zeros(picture.height, picture.width)
        if mask_path.exists():
            stencil = opened(mask_path).convert("L")
            if stencil.size != picture.size:
                raise ValueError(
                    f"{mask_path}: {stencil.size} pixels, its picture has {picture.size}; expected the same"
                )
            mask = torch.from_numpy(np.asarray(stencil, np.float32) / 255)
            if mask.max() < 0.5:
                raise ValueError(
                    f"{mask_path}: all zero, its brightest pixel is {mask.max() * 255:.0f} of 255; paint the concept "
                    "white, or remove the file if the picture is safe"
                )
        pictures.append(from_pil(picture))
        masks.append(F.avg_pool2d(mask[None], sd.config.vae.factor))  # (1, H, W): the area average
        if mask.max() > 0 and masks[-1].max() < 0.5:
            side = sd.config.vae.factor
            raise ValueError(
                f"{mask_path}: covers no half of any {side} x {side} pixels, too small to learn; leave the picture out"
            )
    prompts, seeds = [""] * len(names), None
    if (folder / "captions.json").exists():
        try:
            captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
            if unknown := [name for name in captions if name not in names]:
                raise ValueError(f"{unknown[0]} is no picture")
            entries = [captions.get(name, "") for name in names]
            entries = [e if isinstance(e, dict) else {"prompt": str(e)} for e in entries]
            prompts = [e["prompt"] for e in entries]
            seeds = [int(e["seed"]) for e in entries] if all("seed" in e for e in entries) else None
        except (ValueError, AttributeError, KeyError, TypeError) as e:
            raise ValueError(
                f"{folder / 'captions.json'}: {e}; expected a JSON object of NAME.png to text, see --help"
            ) from e
    return torch.cat(pictures), torch.cat(masks), prompts, seeds


def from_noised(sd, pictures, masks, prompts, levels: int = 25):
    """Queries of given pictures with noise added, at `levels` of the 50 noise levels of sampling."""
    from tqdm import tqdm

    from dag import ddim
    from dag.optimisation import AnnotatedQueries
    from dag.sampling import noise

    data, context, latents = AnnotatedQueries(sd, masks), sd.text.encode(prompts), sd.encode(pictures).cpu()
    start = noise(list(range(len(latents))), latents.shape[1:])
    times = [t for t, _ in ddim.time_pairs(50, sd.config.schedule)[:: 50 // levels]]
    for t in tqdm(times, "queries", unit="level", leave=False):
        data.add(t, ddim.add_noise(latents, start, sd.alphas_cumprod[t]).to(sd.device), context)
    return data


def from_trajectories(sd, masks, prompts, seeds, height: int, width: int, levels: int = 25):
    """Queries along the trajectories the pictures are drawn on; also returns their final latents (N, 4, H, W)."""
    from tqdm import tqdm

    import dag
    from dag.optimisation import AnnotatedQueries
    from dag.sampling import noise

    data, context, factor = AnnotatedQueries(sd, masks), sd.text.encode(prompts), sd.config.vae.factor
    x = noise(seeds, (sd.config.unet.in_channels, height // factor, width // factor)).to(sd.device)
    loop = dag.sample(sd, prompts, dag.CFG(), 50, seeds=seeds, height=height, width=width)
    for step in tqdm(loop, "trajectories", 50, unit="step", leave=False):
        if step.i % (50 // levels) == 0:
            data.add(step.t, x, context)  # x before the step
        x = step.x
    return data, x


def draw(sd, concept: str, unsafe: int, safe: int, seed: int):
    """The miniature draws pictures and the judge annotates them; returns the queries with masks, and the pictures.

    concept: "a COLOUR SHAPE" of the miniature's world. Raises UsageError for another.
    """
    from weights.shapes import annotate, world

    kind = tuple(concept.lower().split()[1:])
    if kind not in world.KINDS:
        raise UsageError(
            f"--concept '{concept}': the miniature draws and annotates 'a COLOUR SHAPE' only, colours "
            f"{', '.join(world.COLOURS)}, shapes {', '.join(world.SHAPES)}; expected one, or --data"
        )
    prompts = annotate.prompts(kind, unsafe, safe, seed)
    seeds = [1000 * (seed + 1) + i for i in range(len(prompts))]
    data, latents = from_trajectories(sd, None, prompts, seeds, sd.config.size, sd.config.size)
    pictures, data.masks = annotate.masks_of(sd, latents, kind)
    return data, pictures


def show(data, tokens_before, tokens_after, pictures, path: Path, count: int = 8) -> None:
    """The contact sheet: picture | mask | map before | map after at three noise levels."""
    import torch.nn.functional as F

    from dag.pictures import contact_sheet, overlay, save_png, to_pil

    unsafe = data.unsafe
    order = [*unsafe.nonzero()[:count, 0].tolist(), *(~unsafe).nonzero()[:count, 0].tolist()]
    levels = [min(range(len(data.times)), key=lambda k: abs(data.times[k] - t)) for t in (801, 501, 201)]
    rows = []
    for i in order:
        (picture,) = to_pil(pictures[i : i + 1])
        mask = F.interpolate(data.masks[i][None, None], picture.size[::-1])[0]  # (1, height, width)
        cells = [picture, *to_pil(mask[None].expand(1, 3, -1, -1) * 2 - 1)]
        for k in levels:
            for tokens in (tokens_before, tokens_after):
                A = tokens.detect(data.maps(tokens.embedding, k, [i]), data.times[k])  # (1, H, W)
                cells.append(overlay(picture, A[0]))
        rows.append(("unsafe" if unsafe[i] else "safe", cells))
    heads = ["picture", "mask", *(f"t {data.times[k]} {when}" for k in levels for when in ("before", "after"))]
    save_png(contact_sheet(rows, heads, side=112), path)


def resumed(path: Path, run: str) -> dict | None:
    """The state of this very run that was stopped, if there is one."""
    import torch

    if not path.exists():
        return None
    try:
        saved = torch.load(path, weights_only=True)
    except Exception:  # a damaged pickle can raise anything
        saved = {}
    if saved.get("run") != run:
        warn(f"{path}: is not the state of this run, which starts anew")
        return None
    print(f"going on from step {saved['state']['step']} ({path})")
    return saved["state"]


def run(args: argparse.Namespace) -> int:
    from dag.config import SHAPES

    writable(args.out.parent)
    if args.out.is_dir() or args.out.suffix == ".png":
        raise UsageError(f"--out {args.out}: expected the name of a token file, such as tokens.safetensors")
    if args.ckpt is not None and args.data is None:
        raise UsageError(
            "--data: needed with --ckpt; expected a folder of annotated pictures (only the miniature draws its own)"
        )
    if args.concept is None and args.ckpt is not None:
        raise UsageError(
            '--concept: needed with --ckpt; expected the text the tokens start from, such as "nude person"'
        )

    import torch
    from tqdm import tqdm

    from dag.files import whole
    from dag.optimisation import PAPER, Recipe, optimise, raise_lo
    from dag.tokens import GuidelineTokens, TokenError

    sd, *_ = open_model(args)
    concept = SHAPES.concept if args.concept is None else args.concept
    safety_text = concept if args.safety_text is None else args.safety_text
    check_text(sd, "--concept", concept)
    check_text(sd, "--safety-text", safety_text)
    before = replace(GuidelineTokens.from_text(sd, concept, safety_text), min_area=args.min_area)
    scaling = before.scaling(sd.config.dag.scaling)
    if args.data is not None:
        pictures, masks, prompts, seeds = read_folder(args.data, sd)
        if not (masks > 0).any():
            raise TokenError(
                f"{args.data}: no unsafe picture, every mask is missing; expected at least one NAME.mask.png"
            )
        if seeds is None:
            print("queries from the pictures with noise added (captions.json has no seed for every picture)")
            data = from_noised(sd, pictures, masks, prompts)
        else:
            print("queries along the trajectories of the captions' prompts and seeds")
            data, latents = from_trajectories(sd, masks, prompts, seeds, *pictures.shape[2:])
            apart = (sd.decode(latents).cpu() - pictures).abs().mean((1, 2, 3)) / 2  # (N,)
            if apart.max() > 0.05:
                raise ValueError(
                    f"{args.data}: picture {int(apart.argmax()) + 1} is not what its prompt and seed draw in 50 steps "
                    f"at scale {sd.config.scale:g} (off by {apart.max():.0%}); leave the seeds out of captions.json"
                )
    else:
        data, pictures = draw(sd, concept, args.n_unsafe, args.n_safe, args.seed)
    unsafe = int(data.unsafe.sum())
    print(f"{unsafe} unsafe and {len(data.masks) - unsafe} safe pictures")
    if unsafe == len(data.masks):
        warn("no safe picture: nothing teaches the tokens what is not the concept; add some look-alikes")

    recipe = replace(PAPER, steps=100 * unsafe) if args.recipe == "paper" else Recipe()
    recipe = replace(recipe, safe_weight=args.safe_weight, steps=recipe.steps if args.steps is None else args.steps)
    seen = hashlib.sha256(pictures.numpy().tobytes() + data.masks.numpy().tobytes()).hexdigest()
    what = [asdict(recipe), args.seed, before.fingerprint, concept, safety_text, data.times, seen]
    state_file = args.out.with_name(args.out.name + ".state")
    state = resumed(state_file, json.dumps(what))
    torch.manual_seed(args.seed)
    bar = tqdm(total=recipe.steps, initial=state["step"] if state else 0, desc="tokens", unit="step", leave=False)
    for progress in optimise(data, before, recipe, args.seed, state=state):
        bar.update()
        if progress.tokens is not None:
            after = progress.tokens
            rough = data.measure(after, scaling, every=8)
            iou = sum(level.iou for level in rough) / len(rough)
            bar.set_postfix(loss=f"{after.loss:.4f}", iou=f"{iou:.2f}")
            with whole(state_file) as temporary:
                torch.save({"run": json.dumps(what), "state": progress.state}, temporary)
    bar.close()
    after = after if recipe.joint else raise_lo(data, after)
    measured = data.measure(after, scaling)
    after = replace(after, iou=sum(level.iou for level in measured) / len(measured))
    after.save(args.out)
    show(data, before, after, pictures, args.out.with_suffix(".png"))
    state_file.unlink()

    held_out, name = data, "training pictures"
    if args.data is None:
        held_out, _ = draw(sd, concept, HELD_OUT, HELD_OUT, args.seed + 77)
        name = f"{HELD_OUT} unsafe and {HELD_OUT} safe held-out pictures"
    print(f"{name}, loss {after.loss:.4f}; edit: share of the frame with A >= {scaling.edit}, unsafe and safe")
    print("   t   IoU  found  false  edit  edit safe")
    for v in held_out.measure(after, scaling, every=4):
        print(f"{v.t:4d}  {v.iou:.2f}   {v.found:.2f}   {v.false:.2f}  {v.edit:.2f}   {v.edit_safe:.2f}")
    print(f"{args.out} and {args.out.with_suffix('.png')}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return guarded("train_tokens.py", lambda: run(arguments(argv)), argv)


if __name__ == "__main__":
    sys.exit(main())
