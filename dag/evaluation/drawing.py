"""Drawing a run: which batches are missing, which of them are this process's, and a row for each picture.

A set's pictures are divided into batches once, whatever has been drawn and however many processes there are; the
batches of all methods and sets, in order, go to the processes in turn. What a picture is drawn beside is then the same
in every run, and so is the picture. A batch of which something is missing is drawn whole, and only the missing rows are
written.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

import dag
from dag.cli import setup
from dag.cli.drawing import draw, too_large
from dag.cli.parsing import UsageError, warn
from dag.cli.pictures import is_whole, save_png
from dag.cli.report import Drawing
from dag.config import DAGConfig
from dag.model import MINIATURE, recognise
from kernels.choice import WithoutMaps
from weights.checkpoint import sha256
from weights.files import atomic_write
from weights.overlay import Overlay

from . import ledger
from .methods import described, method
from .prompts import Prompt, PromptSet

Batch = tuple[str, PromptSet, list[tuple[Prompt, int]]]  # method, set, (prompt, number of its picture)
SUITE_METHODS = {  # drawn by default
    "shapes": "none,dag,negative,sld-weak,sld-medium,sld-strong,sld-max,sega,dag-sld,dag-no-area,dag-no-magnitude,"
    "dag-joint",
    "concepts": "none,dag", None: "none,dag",
}  # fmt: skip
SUITE_TOKENS = {"shapes": ("red-circle",), "concepts": ("red-circle", "blue-star")}
ROOT = Path(__file__).resolve().parents[2]


def run(args: argparse.Namespace, sets: list[PromptSet]) -> int:
    """Draw what is missing of these sets and is this process's."""
    k, n = ledger.rank()
    suites = {s.suite for s in sets}
    if len(suites) > 1:
        raise UsageError(f"--prompts {', '.join(args.prompts)}: the miniature's suites are runs of their own")
    (suite,) = suites
    if suite and args.ckpt is not None:
        raise UsageError(f"--prompts {suite} is the miniature's; leave out --ckpt")
    file, config = recognise(args.ckpt, args.prediction)
    files = args.tokens or [MINIATURE / f"{name}.safetensors" for name in SUITE_TOKENS.get(suite, ("red-circle",))]
    files = files if args.ckpt is None or args.tokens else []
    tokens = [dag.GuidelineTokens.load(path) for path in files]
    names = [name.strip() for name in (args.methods or SUITE_METHODS[suite]).split(",")]
    if suite and "none" not in names:
        names = ["none", *names]  # the judge tells of changes
    try:
        methods = {name: method(name, config, tokens) for name in names}
    except ValueError as e:
        raise UsageError(f"--methods: {e}") from e
    args.device = args.device or setup.default_device()
    if args.device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        args.device += f":{local % max(1, torch.cuda.device_count())}"  # a process may be shown only its own
    setup.check_device(args.device)
    before = ledger.loaded(args.folder / "run.json") if (args.folder / "run.json").exists() else {}
    args.dtype = args.dtype or before.get("dtype", setup.default_dtype(args.device))
    size = args.height or config.size, args.width or config.size
    batch = args.batch_size or min(16, max(1, 4 * 512 * 512 // (size[0] * size[1])))
    settings = {
        "model": {"name": config.name, "file": file.path.name, "sha256": sha256(file.path)} | overlaid(args),
        "tokens": [
            {"file": path.name, "sha256": sha256(path), "concept": t.concept}
            for path, t in zip(files, tokens, strict=True)
        ],
        "steps": args.steps, "scale": config.scale if args.scale is None else args.scale, "seed": args.seed or 0,
        "height": size[0], "width": size[1], "images": args.images, "batch_size": batch, "sampler": "DDIM",
        "dtype": args.dtype,
        "sets": {s.name: s.about | {"count": len(s.prompts), "suite": s.suite} for s in sets},
        "methods": {name: described(guidance) for name, guidance in methods.items()},
    }  # fmt: skip
    process = ledger.process_name()
    texts = {f"{s.name}/{p.id}": p.text for s in sets for p in s.prompts}
    ledger.opened(args.folder, settings, texts, process)

    done = {key for key, row in ledger.Run.read(args.folder).pictures().items() if finished(args.folder, row)}
    mine = list(batches(sets, names, args.images, batch))[k::n]
    mine = [b for b in mine if not done.issuperset(keys(b))]
    if mine:
        drawn(args, process, (k, n), mine, done, tokens, settings)
    if k == 0:
        said(args.folder)
    return 0  # though pictures failed: torchrun would end all other processes


def overlaid(args: argparse.Namespace) -> dict:
    """What lies over the model, for the record: nothing, or a file's hash, or those of a folder's one."""
    if args.overlay is None:
        return {}
    file = Overlay.inside(args.overlay)
    return {"overlay": args.overlay.name, "overlay_sha256": sha256(file), "overlay_strength": args.overlay_strength}


def said(folder: Path) -> None:
    """How much of a run there is."""
    whole = ledger.Run.read(folder)
    pictures, expected = whole.pictures(), whole.expected()
    there, failed = len(pictures), sum(row["file"] is None for row in pictures.values())
    lack = "" if there == expected else f"; {expected - there} are missing: start again once all processes have ended"
    print(f"{folder}: {there} of {expected} pictures{f', {failed} of them failed' if failed else ''}{lack}")


def finished(folder: Path, row: dict) -> bool:
    """Whether a row's picture is there to its end, or could not be drawn at all."""
    return row["file"] is None or is_whole(folder / row["file"])


def batches(sets: list[PromptSet], methods: list[str], images: int, size: int) -> Iterator[Batch]:
    """All batches of a run. The pictures of one have the same guidance scale, as one call of the UNet's loop needs."""
    for name in methods:
        for s in sets:
            by_scale: dict[float | None, list[tuple[Prompt, int]]] = {}
            for prompt in s.prompts:
                by_scale.setdefault(prompt.scale, []).extend((prompt, i) for i in range(images))
            for items in by_scale.values():
                for at in range(0, len(items), size):
                    yield name, s, items[at : at + size]


def keys(batch: Batch) -> list[str]:
    """The keys of a batch's rows."""
    name, s, items = batch
    return [f"{s.name}/{prompt.id}/{i}/{name}" for prompt, i in items]


def place(row: dict) -> str:
    """A picture's file in the run's folder; what no file should be called is written as %XX."""
    folders = (quote(part, safe="=:").replace(":", ",") for part in (row["set"], row["method"]))
    return f"pictures/{'/'.join(folders)}/{quote(row['id'], safe='')}-{row['image']}.png"


def drawn(
    args: argparse.Namespace,
    process: str,
    ranks: tuple[int, int],
    todo: list[Batch],
    done: set[str],
    tokens: list[dag.GuidelineTokens],
    settings: dict,
) -> None:
    """Draw batches and write their rows."""
    sd, device, dtype = setup.open_model(args)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # Triton launches where torch is, not where its tensors are
    for concept in tokens:
        if message := concept.check(sd):
            warn(message)
    fused, attention = setup.attention(args.attention, sd, tokens)
    blind = [WithoutMaps(sd.unet, tokens, fused)] if fused and tokens else []
    size, room = (settings["height"], settings["width"]), settings["batch_size"]
    for name in (name for name in settings["methods"] if name.startswith("dag")):
        warmup = settings["methods"][name]["warmup"]
        if args.steps <= warmup:
            warn(f"--steps {args.steps} is not more than {name}'s warm-up of {warmup} steps: nothing will be guided")
    rows = ledger.Rows(args.folder, "draw", process)
    rows.append({"kind": "process", "process": process, "of": "draw"} | environment(ranks, device, attention))
    total, count, told = sum(key not in done for b in todo for key in keys(b)), 0, time.time()
    for batch in todo:
        name, s, items = batch
        guidance = method(name, sd.config, tokens, fused)
        parts = [list(zip(keys(batch), items, strict=True))]
        while parts:
            part = parts.pop(0)
            if len(part) > room:
                parts = [part[:room], part[room:], *parts]
                continue
            jobs = [(p.text, (settings["seed"] if p.seed is None else p.seed) + i) for _, (p, i) in part]
            scale = settings["scale"] if items[0][0].scale is None else items[0][0].scale
            title = f"{name}, {s.name}, pictures {count + 1} to {count + len(part)} of {total}"
            hooks = [] if guidance.tokens else blind
            try:
                made = draw(sd, jobs, name, guidance, args.steps, scale, size, hooks, title)
            except (RuntimeError, MemoryError) as e:
                if not setup.out_of_memory(e):
                    raise
                if len(part) == 1:
                    raise too_large(size, dtype, device) from e
                room = len(part) // 2
                warn(f"out of memory with {len(part)} pictures side by side: halving that; see --batch-size")
                parts = [part, *parts]
                continue
            for (key, (prompt, i)), drawing in zip(part, made, strict=True):
                if key in done:
                    continue
                rows.append(save(args.folder, key, s, prompt, i, scale, drawing, sd.config.dag))
                count += 1
        if time.time() - told > 60:
            told = time.time()
            print(f"rank {ranks[0]} of {ranks[1]}: {count} of {total} pictures", flush=True)
    rows.close()


def save(
    folder: Path, key: str, s: PromptSet, prompt: Prompt, i: int, scale: float, drawing: Drawing, cfg: DAGConfig
) -> dict:
    """Write a picture whole, and say everything about it in a row. `none` looks with the model's own constants."""
    row = {"kind": "picture", "key": key, "set": s.name, "id": prompt.id, "image": i, "method": drawing.method}
    row |= {"variant": s.about["variant"], "prompt_sha256": hashlib.sha256(prompt.text.encode()).hexdigest()}
    row |= {"seed": drawing.seed, "scale": scale} | prompt.more
    row |= {"unet_rows": drawing.unet_rows, "seconds": round(drawing.seconds, 3), "file": None}
    if drawing.failed:
        warn(f"{key}: no picture, {drawing.failed}")
        return row | {"failed": drawing.failed}
    looks = replace(drawing, cfg=cfg) if drawing.method.startswith("none") else drawing
    row |= {"file": place(row), "pixels_sha256": hashlib.sha256(drawing.image.tobytes()).hexdigest()[:16]}
    row |= {name: looks.findings[name] for name in ("detected", "found", "steps_guided", "scale_max", "map_max")}
    path = folder / row["file"]
    path.parent.mkdir(parents=True, exist_ok=True)
    if s.suite == "shapes" and drawing.method == "none":  # what the judge compares with its masks
        with atomic_write(path.with_suffix(".npy")) as temporary, open(temporary, "wb") as file:
            np.save(file, drawing.A.amax(1).half().numpy())  # (steps, H, W)
    told = {name: value for name, value in row.items() if name != "seconds"}  # so that the file is always the same
    save_png(drawing.image, path, {"row": json.dumps(told, ensure_ascii=False)})
    return row


def environment(ranks: tuple[int, int], device: str, attention: str) -> dict:
    """What a process draws with, which may differ between the processes of one run."""
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "rank": ranks[0], "world": ranks[1], "device": device, "device_name": gpu or platform.machine(),
        "threads": torch.get_num_threads(), "attention": attention, "torch": torch.__version__,
        "python": platform.python_version(), "code": code_version(),
    }  # fmt: skip


def code_version() -> str:
    """The checkout's commit, with -dirty if files differ from it; the package's version where there is no checkout."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return told.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version("detect-and-guide")
