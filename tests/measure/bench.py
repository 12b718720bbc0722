"""Speed and memory beside diffusers' on this machine's CPU, as a table.

  python -m tests.bench --folder DIR     SD 1.4's size: writes two files of 4.3 GB into DIR, needs 10 GB of memory
  python -m tests.bench --tiny           the miniature's widths, to see that it runs; the figures mean nothing

Networks are timed alternately in one process, on shared weights, with a warm-up; the ratio is that of the medians.
Loading and whole runs happen in a fresh process each, on the same file, which has been read before. Loading ends when
every weight has been touched; "grown" is resident memory after it, "peak" the highest of the process.
The .ckpt has no Lightning entries, because diffusers refuses those.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from dag import DAG, GuidelineTokens
from dag.attention import cross_attention, guideline_maps
from dag.config import SD14, SHAPES, Config
from tests import parity, references
from tests.files import original, write_ckpt, write_safetensors

PROMPT, STEPS, SCALE = "a photograph of an astronaut riding a horse", 4, 7.5


def status(field: str) -> int:
    """Bytes of resident memory now (VmRSS) or at most (VmHWM), from Linux's /proc."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def touched(*modules: torch.nn.Module) -> int:
    """Read every weight; returns their bytes."""
    parameters = [p for module in modules for p in module.parameters()]
    assert all(p.sum(dtype=torch.float32).isfinite() for p in parameters)
    return sum(p.nbytes for p in parameters)


# --- in a process of its own


def load_ours(path: str, dtype: torch.dtype):
    import dag

    return dag.load(path, dtype=dtype)


def load_theirs(path: str, dtype: torch.dtype):
    """The pipeline, without a safety checker, from the file and a folder of configs beside it."""
    folder = Path(path).parent / "configs"
    return references.diffusers.StableDiffusionPipeline.from_single_file(
        path, config=str(folder), local_files_only=True, torch_dtype=dtype, safety_checker=None
    )


def alone(whose: str, path: str, dtype: str, draw: bool) -> dict[str, float]:
    """Load, and draw if asked for; seconds and bytes of each."""
    load = load_ours if whose == "ours" else load_theirs
    references.diffusers.StableDiffusionPipeline, references.convert  # imported before the clock starts  # noqa: B018
    start, before = time.perf_counter(), status("VmRSS")
    model = load(path, getattr(torch, dtype))
    names = ("unet", "vae", "text") if whose == "ours" else ("unet", "vae", "text_encoder")
    weights = touched(*(getattr(model, name) for name in names))
    found = {"load s": time.perf_counter() - start, "grown": status("VmRSS") - before, "weights": weights}
    if draw:
        start = time.perf_counter()
        picture_of_ours(model) if whose == "ours" else picture_of_theirs(model)
        found |= {"draw s": time.perf_counter() - start, "peak": status("VmHWM")}
    return found


@torch.no_grad()
def picture_of_ours(sd) -> torch.Tensor:
    from dag import CFG, sample

    *_, last = sample(sd, [PROMPT], CFG(), steps=STEPS, scale=SCALE, seeds=[0])
    return sd.decode(last.x)


def picture_of_theirs(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=SCALE, generator=generator, output_type="pt")


def child(*argv: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", "tests.bench", "--alone", *argv], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{argv}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- in one process


def alternately(rounds: int, ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of each, after one warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(rounds + 1):
        for run, kept in zip((ours, theirs) if k % 2 else (theirs, ours), times if k % 2 else times[::-1], strict=True):
            start = time.perf_counter()
            run()
            if k:
                kept.append(time.perf_counter() - start)
    return median(times[0]), median(times[1])


def row(what: str, ours: float, theirs: float, unit: str, limit: float | None) -> None:
    goal = "" if limit is None else f"{limit:g}"
    print(f"| {what} | {ours:.3f} {unit} | {theirs:.3f} {unit} | {ours / theirs:.3f} | {goal} |", flush=True)


def maps_share(case: parity.Case, rounds: int) -> tuple[float, float]:
    """Seconds that a step of two rows spends on guideline maps of one concept, and seconds of the step."""
    sd = case.sd
    tokens = GuidelineTokens.from_text(sd, "red circle", "circle")
    probe, spent = DAG(tokens).start(sd, slice(1, 2)), []

    def timed(q, k, v, dk, rows):
        out = cross_attention(q, k, v)
        start = time.perf_counter()
        maps = guideline_maps(q[rows], dk)
        spent[-1] += time.perf_counter() - start
        return out, maps

    probe.attention = timed
    x, t, context = parity.inputs(case, 2, *case.sizes[0][1:])
    steps = []
    for _ in range(rounds + 1):
        spent.append(0.0)
        start = time.perf_counter()
        sd.unet(x, t, context, probe)
        steps.append(time.perf_counter() - start)
        start = time.perf_counter()
        probe.maps(*x.shape[2:])
        spent[-1] += time.perf_counter() - start
    return median(spent[1:]), median(steps[1:])


@torch.no_grad()
def networks(case: parity.Case, rounds: int) -> None:
    _, H, W = case.sizes[0]
    x, t, context = parity.inputs(case, 2, H, W)
    ours, theirs = alternately(
        rounds, lambda: case.sd.unet(x, t, context), lambda: case.unet(x, t, encoder_hidden_states=context)
    )
    row("UNet step, 2 rows", ours, theirs, "s", 0.90)
    ours, theirs = alternately(rounds, lambda: case.sd.vae.decode(x[:1]), lambda: case.vae.decode(x[:1]))
    row("VAE decode, 1 picture", ours, theirs, "s", 0.95)
    spent, step = maps_share(case, rounds)
    row("maps of one concept, and the step they are part of", spent, step, "s", 0.01)


def files(folder: Path, config: Config, rounds: int) -> None:
    references.config_folder(config, folder / "configs")
    for kind, write in ((".ckpt", write_ckpt), (".safetensors", write_safetensors)):
        path = folder / f"random{kind}"
        write(path, original(config), *([False] if kind == ".ckpt" else []))
        for dtype in ("float32", "float16"):
            draw = kind == ".ckpt" and dtype == "float32"
            runs = {who: [] for who in ("ours", "theirs")}
            for k in range(1 if draw else rounds):
                for who in list(runs)[:: 1 if k % 2 else -1]:
                    runs[who].append(child(who, str(path), dtype, *(["--draw"] if draw else [])))
            ours, theirs = ({k: median(r[k] for r in runs[who]) for k in runs[who][0]} for who in runs)
            row(f"load {kind} as {dtype}, time", ours["load s"], theirs["load s"], "s", 0.5)
            row(f"load {kind} as {dtype}, grown", ours["grown"] / 1e9, theirs["grown"] / 1e9, "GB", None)
            row("the same, over the weights' bytes", ours["grown"] / 1e9, ours["weights"] / 1e9, "GB", 1.15)
            if draw:
                row(f"sampling, {STEPS} steps and decoding", ours["draw s"], theirs["draw s"], "s", 0.90)
                row("sampling, peak of the process", ours["peak"] / 1e9, theirs["peak"] / 1e9, "GB", 0.95)
        path.unlink()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("networks", "files"))
    parser.add_argument("--alone", nargs=3, metavar=("WHOSE", "FILE", "DTYPE"), help="used by the program itself")
    parser.add_argument("--draw", action="store_true", help="used by the program itself")
    args = parser.parse_args(argv)
    if args.alone:
        print(json.dumps(alone(*args.alone, args.draw)))
        return
    print(f"{torch.get_num_threads()} threads\n\n| what | ours | theirs | ratio | goal |\n|---|---|---|---|---|")
    if args.only != "networks":
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            files(Path(folder), SHAPES if args.tiny else SD14, args.rounds)
    if args.only != "files":
        networks(parity.tiny() if args.tiny else parity.full(), args.rounds)


if __name__ == "__main__":
    main()
