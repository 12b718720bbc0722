"""Train the miniature, part by part: `python -m weights.shapes.train vae`, then `judge`, then `text+unet`.

Every part keeps its state in runs/ and goes on from there when it is started again; its batches depend on the step
number alone, so a run that was cut differs from one that was not only by float noise. At its end a part prints what it
reached on held-out scenes, and is written beside this file only if that is enough.
"""

import argparse
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag.config import SHAPES
from dag.vae import AutoencoderKL
from weights.shapes import world

RUNS = Path("runs")
HELD_OUT = 10_000_000  # scenes from this seed on are never trained on


def pictures(scenes: list[world.Scene], first: int) -> Tensor:
    """Renders of scenes -> (b, 3, 128, 128) uint8; scene i is drawn with seed first + i."""
    drawn = np.stack([world.render(scene, first + i)[0] for i, scene in enumerate(scenes)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


def to_float(x: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return x.float() / 127.5 - 1


def scenes_from(seed: int, count: int) -> list[world.Scene]:
    rng = random.Random(seed)
    return [world.random_scene(rng) for _ in range(count)]


class Run:
    """One training run: AdamW, one-cycle learning rate, EMA, state on disk, progress with ETA."""

    def __init__(self, name: str, model: nn.Module, steps: int, lr: float, ema: float):
        self.name, self.model, self.steps, self.lr, self.decay = name, model, steps, lr, ema
        self.path, self.step = RUNS / f"{name}.pt", 0
        self.ema = {k: v.clone() for k, v in model.state_dict().items()}
        self.opt = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.step, self.ema = state["step"], state["ema"]
            model.load_state_dict(state["model"])
            self.opt.load_state_dict(state["opt"])
            print(f"{name}: going on from step {self.step}")

    def save(self) -> None:
        RUNS.mkdir(exist_ok=True)
        state = {"step": self.step, "model": self.model.state_dict(), "ema": self.ema, "opt": self.opt.state_dict()}
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def learn(self, loss_of: Callable[[int], Tensor]) -> nn.Module:
        """Minimise loss_of(step), then give the model its averaged weights."""
        started, first, mean = time.time(), self.step, None
        self.model.train()
        while self.step < self.steps:
            torch.manual_seed(self.step)
            u = self.step / self.steps
            for group in self.opt.param_groups:  # 2 % warm-up, then half a cosine
                group["lr"] = self.lr * min(1, self.step / (0.02 * self.steps) + 0.01) * (0.01 + 0.99 * np.cos(u * np.pi / 2) ** 2)
            loss = loss_of(self.step)
            self.opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.opt.step()
            self.step += 1
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            for k, v in self.model.state_dict().items():
                if v.is_floating_point():
                    self.ema[k].lerp_(v, 1 - decay)
                else:
                    self.ema[k].copy_(v)
            mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
            if self.step % 100 == 0 or self.step == self.steps:
                pace = (time.time() - started) / (self.step - first)
                left = pace * (self.steps - self.step) / 60
                print(f"{self.name} {self.step}/{self.steps}  loss {mean:.4f}  {pace:.2f} s a step  {left:.0f} min left", flush=True)
            if self.step % 500 == 0 or self.step == self.steps:
                self.save()
        self.model.load_state_dict(self.ema)
        return self.model.eval().requires_grad_(False)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def train_vae(steps: int) -> None:
    """KL autoencoder: L1 + L1 of the edges + a small KL; crops of 64 pixels, whole pictures for the last quarter."""
    data = pictures(scenes_from(1, 8000), 1)
    vae = AutoencoderKL(SHAPES.vae)
    run = Run("vae", vae, steps, lr=2e-3, ema=0.998)

    def loss_of(step: int) -> Tensor:
        whole = step >= 0.76 * steps
        side, b = (128, 12) if whole else (64, 32)
        y, x = (torch.randint(0, 129 - side, (2, b))).tolist()
        batch = torch.stack([data[i, :, r : r + side, c : c + side] for i, r, c in zip(torch.randint(0, len(data), (b,)).tolist(), y, x, strict=True)])
        batch = to_float(batch)
        batch = torch.where(torch.rand(b, 1, 1, 1) < 0.5, batch, batch.flip(3))
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = (m.float() for m in vae.encode(batch))
            z = mean + torch.randn_like(mean) * (0.5 * logvar.clamp(-30, 20)).exp()
            out = vae.decode(z)
        out = out.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(out), edges(batch), strict=True))
        return (out - batch).abs().mean() + edge + 3e-4 * kl

    run.learn(loss_of)


if __name__ == "__main__":
    torch.set_num_threads(2)
    train_vae(5000)
