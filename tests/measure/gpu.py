"""What a step of SD 1.4 costs on a GPU: time, kernels, host reads and memory, in float16 on random weights.

  python -m tests.measure.gpu

Times are of whole steps, the best of two loops, by turns; nothing else should run. counts.py counts without a GPU.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

import dag
from dag.config import SD14
from dag.model import StableDiffusion
from kernels.choice import WithoutMaps
from kernels.cross_attention import cross_attention_with_maps as fused

PROMPT, STEPS = "a photo", 10


def model() -> StableDiffusion:
    torch.manual_seed(0)
    with torch.device("cuda"):
        sd = StableDiffusion(SD14)
    return sd.half().eval().requires_grad_(False)


def concept(sd: StableDiffusion, find: bool) -> dag.GuidelineTokens:
    """Tokens that find nothing, or several objects with a rim in what random weights show."""
    tokens = dag.GuidelineTokens.from_text(sd, "a red circle", "a blue star")
    tokens = replace(tokens, levels=(0,), lo=(0.0,), hi=(1.0,), min_area=0.0)
    if not find:
        return replace(tokens, lo=(2.0,), hi=(3.0,))
    *_, last = dag.sample(sd, [PROMPT], dag.DAG(tokens), 3)
    lo, hi = last.A.flatten().cpu().quantile(torch.tensor([0.3, 0.95])).tolist()
    return replace(tokens, lo=(lo,), hi=(hi,))


def methods(sd: StableDiffusion) -> dict[str, tuple[dag.Guidance, list]]:
    """Name -> method and hooks of its loop."""
    cfg, nothing, much = replace(sd.config.dag, warmup=0), concept(sd, False), concept(sd, True)
    cfg = replace(cfg, scaling=replace(cfg.scaling, full=1.01))
    return {
        "CFG": (dag.Guidance(), []),
        "CFG, kernel": (dag.Guidance(), [WithoutMaps(sd.unet, [nothing], fused)]),
        "DAG, nothing found": (dag.DAG(nothing), []),
        "DAG, nothing found, kernel": (dag.DAG(nothing, fused=fused), []),
        "DAG, guided": (dag.DAG(much, cfg=cfg), []),
        "DAG, guided, kernel": (dag.DAG(much, cfg=cfg, fused=fused), []),
    }


def milliseconds(sd: StableDiffusion, guidance: dag.Guidance, hooks: list, b: int, guided: bool) -> float:
    """Of one step, in which all pictures are guided or none."""
    steps = dag.sample(sd, [PROMPT] * b, guidance, STEPS + 1, hooks=hooks)
    next(steps)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for step in steps:
        assert step.guided.tolist() == [guided] * b
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / STEPS


def waits_and_kernels(sd: StableDiffusion, guidance: dag.Guidance, hooks: list, b: int) -> tuple[int, int]:
    """Of one step: how often the host waits for the GPU, and what it sends there."""
    steps = dag.sample(sd, [PROMPT] * b, guidance, 4, hooks=hooks)
    next(steps), next(steps)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        next(steps)
    torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        next(steps)
        torch.cuda.synchronize()
    waits = sum("synchroniz" in str(warning.message) and "prototype" not in str(warning.message) for warning in raised)
    return waits, sum(str(event.device_type).endswith("CUDA") for event in trace.events())


@torch.no_grad()
def peak(call: Callable[[], object]) -> str:
    """GiB that a call takes beside what was there."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}"


def main() -> None:
    sd = model()
    ways = methods(sd)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n| batch, method | ms | waits | kernels |")
    print("|---|---|---|---|")
    for b in (1, 4):
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(2):
            best = {name: min(best[name], milliseconds(sd, *way, b, "guided" in name)) for name, way in ways.items()}
        for name, way in ways.items():
            waits, sent = waits_and_kernels(sd, *way, b)
            print(f"| {b}, {name} | {best[name]:.1f} | {waits} | {sent} |", flush=True)
    print("\n| GiB beside the weights | encode | two steps of DAG | decode |\n|---|---|---|---|")
    for side, b in ((512, 1), (512, 4), (768, 1), (768, 4)):
        x, picture = torch.zeros(b, 4, side // 8, side // 8), torch.zeros(b, 3, side, side)
        guidance, hooks = ways["DAG, guided"]
        size = dict(height=side, width=side, hooks=hooks)
        steps = peak(lambda: list(dag.sample(sd, [PROMPT] * b, guidance, 2, **size)))  # noqa: B023
        encode, decode = peak(lambda: sd.encode(picture)), peak(lambda: sd.decode(x))  # noqa: B023
        print(f"| {side} x {side}, batch {b} | {encode} | {steps} | {decode} |", flush=True)


if __name__ == "__main__":
    main()
