"""What the lazy safety branch changes and costs: DAG beside plain guidance and beside itself with the eager branch.

  python -m tests.measure.lazy                 the miniature, 200 prompts of four sets, 20 steps
  python -m tests.measure.lazy --prompts 2     two of each set, to see that it runs

All three draw the same batches from the same seeds; latents are compared before decoding. Time is that of 32 benign
prompts, by turns, three times each after one that does not count; ratios are of the medians. The exit status is 1 if a
picture that was never guided is not bit for bit plain guidance, or if a guided one is more than 1e-5 of the largest
value off the eager branch.
"""

import argparse
import sys
import time
from dataclasses import replace
from statistics import median

import torch

import dag
from dag.guidance import Estimate, Inputs
from dag.model import MINIATURE
from weights.shapes.world import NAMED, prompt_sets

STEPS, BATCH, SEED = 20, 20, 2


class Eager(dag.DAG):
    """DAG with the safety branch of one concept run for every image at every step, as SLD and SEGA run it."""

    def __call__(self, step: Inputs) -> Estimate:
        every = step.safety(0, list(range(len(step.x))))  # (b, 4, H, W)
        return super().__call__(replace(step, safety=lambda concept, images: every[images]))


def draw(sd, prompts: list[str], guidance: dag.Guidance) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Final latents (N, 4, H, W), UNet rows per step (N,) float and whether a picture was ever guided (N,) bool."""
    batches = []
    for k in range(0, len(prompts), BATCH):
        part = prompts[k : k + BATCH]
        steps = list(dag.sample(sd, part, guidance, STEPS, seeds=list(range(k, k + len(part)))))
        rows, guided = (torch.stack([getattr(step, name) for step in steps]) for name in ("unet_rows", "guided"))
        batches.append((steps[-1].x, rows.float().mean(0), guided.any(0)))
    return tuple(torch.cat(values) for values in zip(*batches, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50, help="of each set (default: 50)")
    args = parser.parse_args()
    sd, tokens = dag.load(), dag.GuidelineTokens.load(MINIATURE / "red-circle.safetensors")
    sets = prompt_sets(args.prompts, SEED)
    prompts = [prompt for name in NAMED for prompt, _ in sets[name]]
    methods = {"plain": dag.Guidance(), "DAG": dag.DAG(tokens), "eager DAG": Eager(tokens)}
    (plain, *_), (lazy, rows, ever), (eager, eager_rows, _) = (draw(sd, prompts, m) for m in methods.values())
    same = [torch.equal(a, b) for a, b in zip(plain, lazy, strict=True)]
    unguided = [equal for equal, guided in zip(same, ever.tolist(), strict=True) if not guided]
    print(f"never guided: {len(unguided)} of {len(prompts)}, bit for bit plain guidance: {sum(unguided)}")
    error, largest = (lazy - eager)[ever].abs().max().item() if ever.any() else 0.0, eager.abs().max().item()
    print(f"guided: {sum(ever)}, largest difference from the eager branch: {error:.1e} of {largest:.1f}")
    for name, lazily, eagerly in zip(NAMED, rows.chunk(len(NAMED)), eager_rows.chunk(len(NAMED)), strict=True):
        print(f"UNet rows per step, {name}: {lazily.mean():.2f} (eager {eagerly.mean():.2f})")

    benign = [prompt for prompt, _ in prompt_sets(32, SEED)["benign"]]
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(4):
        for name, method in methods.items():
            began = time.perf_counter()
            draw(sd, benign, method)
            seconds[name] += [time.perf_counter() - began] * (turn > 0)
    for name, times in seconds.items():
        ratio = median(times) / median(seconds["plain"])
        print(f"seconds on {len(benign)} benign prompts, {name}: {median(times):.2f}, {ratio:.3f} of plain")
    return int(not all(unguided) or error > 1e-5 * largest)


if __name__ == "__main__":
    sys.exit(main())
