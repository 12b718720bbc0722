"""Speed and memory beside diffusers' on this machine's CPU, as a table.

  python -m tests.measure.bench --folder DIR   SD 1.4's size: writes two files of 4.3 GB into DIR, needs 10 GB of memory
  python -m tests.measure.bench --tiny         the miniature's widths, to see that it runs; the figures mean nothing

Networks are timed alternately in one process, on shared weights, with a warm-up; the ratio is that of the medians.
Loading and whole runs happen in a fresh process each, on the same file, which has been read before. Loading ends when
every weight has been touched; "grown" is how much resident memory grew by then, "peak" the highest of the process.
The .ckpt has no Lightning entries, because diffusers refuses those.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import dag
from dag.attention import NO_ROWS, Call
from dag.cam import Probe
from dag.config import SD14, SHAPES, Config
from kernels import convolution
from tests import references
from tests.files import original, resident, write_ckpt, write_safetensors
from tests.measure import parity

PROMPT, STEPS, SCALE = "a photograph of an astronaut riding a horse", 4, 7.5


def touched(*modules: torch.nn.Module) -> int:
    """Read every weight; returns their bytes."""
    parameters = [p for module in modules for p in module.parameters()]
    assert all(p.sum(dtype=torch.float32).isfinite() for p in parameters)
    return sum(p.nbytes for p in parameters)


def seconds(run: Callable[..., object], *args) -> float:
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


# --- in a process of its own


def load_theirs(path: str, dtype: torch.dtype):
    """The pipeline, without a safety checker, from the file and a folder of configs beside it."""
    folder = Path(path).parent / "configs"
    return references.diffusers.StableDiffusionPipeline.from_single_file(
        path, config=str(folder), local_files_only=True, torch_dtype=dtype, safety_checker=None
    )


@torch.no_grad()
def draw_ours(sd) -> None:
    *_, last = dag.sample(sd, [PROMPT], dag.Guidance(), steps=STEPS, scale=SCALE, seeds=[0])
    sd.decode(last.x)


def draw_theirs(pipeline) -> None:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=SCALE, generator=generator, output_type="pt")


def alone(whose: str, path: str, dtype: str, draw: bool) -> dict[str, float]:
    """Load, and draw if asked for; seconds and bytes of each."""
    ours = whose == "ours"
    references.diffusers.StableDiffusionPipeline, references.convert  # imported before the clock starts  # noqa: B018
    start, before = time.perf_counter(), resident()
    model = (dag.load if ours else load_theirs)(path, dtype=getattr(torch, dtype))
    weights = touched(model.unet, model.vae, model.text if ours else model.text_encoder)
    found = {"load s": time.perf_counter() - start, "grown": resident() - before, "weights": weights}
    if draw:
        found |= {"draw s": seconds(draw_ours if ours else draw_theirs, model), "peak": resident(peak=True)}
    return found


def child(*argv: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.measure.bench", "--alone", *argv], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{argv}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- in one process


def alternately(rounds: int, ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of each, after one warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(rounds + 1):
        for which in (0, 1) if k % 2 else (1, 0):
            times[which].append(seconds((ours, theirs)[which]))
    return median(times[0][1:]), median(times[1][1:])


def row(what: str, ours: float, theirs: float, unit: str, limit: float | None) -> None:
    goal = "" if limit is None else f"{limit:g}"
    print(f"| {what} | {ours:.3f} {unit} | {theirs:.3f} {unit} | {ours / theirs:.3f} | {goal} |", flush=True)


class TimedProbe(Probe):
    """Adds up the seconds that its maps take."""

    spent = 0.0

    def attention(self, *args) -> None:
        self.spent += seconds(super().attention, *args)

    def read(self, *args) -> None:
        self.spent += seconds(super().read, *args)


def maps_share(case: parity.Case, rounds: int) -> tuple[float, float]:
    """Median seconds that a step of two rows spends on guideline maps of one concept, and of the step; one warm-up."""
    sd, steps, spent = case.sd, [], []
    x, t, context = parity.inputs(case, 2, *case.sizes[0][1:])
    for _ in range(rounds + 1):
        probe = TimedProbe(sd.unet, [dag.GuidelineTokens.from_text(sd, "red circle", "circle")])
        probe.call = Call(0, 981, slice(0, 1), slice(1, 2), NO_ROWS)
        steps.append(seconds(sd.unet, x, t, context, [probe]))
        probe.read(981, *x.shape[2:])
        spent.append(probe.spent)
    return median(spent[1:]), median(steps[1:])


@torch.no_grad()
def networks(case: parity.Case, rounds: int) -> None:
    for network in (case.sd.unet, case.sd.vae):
        convolution.install(network)  # as loading does
    _, H, W = case.sizes[0]
    x, t, context = parity.inputs(case, 2, H, W)
    unets = alternately(rounds, lambda: case.sd.unet(x, t, context), lambda: case.unet(x, t, context))
    row("UNet step, 2 rows", *unets, "s", 0.85)
    vaes = alternately(rounds, lambda: case.sd.vae.decode(x[:1]), lambda: case.vae.decode(x[:1]))
    row("VAE decode, 1 picture", *vaes, "s", 0.80)
    row("maps of one concept, and the step they are part of", *maps_share(case, rounds), "s", 0.01)


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
