"""Train the miniature, part by part: `python -m weights.shapes.train judge`, then `vae`, then `text+unet`.

Every part keeps its state in runs/ and goes on from there when it is started again; its batches depend on the step
number alone, so a run that was cut differs from one that was not only by float noise. At its end a part prints what it
reached on held-out scenes, and is written beside this file only if that is enough. On Linux a step is a quarter faster
with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 in the environment: glibc then keeps its memory.
"""

import argparse
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dag
from dag import ddim
from dag.config import SHAPES
from dag.model import MINIATURE
from dag.text import Text
from dag.unet import UNet
from dag.vae import AutoencoderKL
from weights import known
from weights.files import atomic_write
from weights.shapes import world
from weights.shapes.judge import FILE, Judge, following

MODEL = MINIATURE / "shapes.safetensors"
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
        with atomic_write(self.path) as temporary:
            torch.save(state, temporary)

    def learn(self, loss_of: Callable[[int], Tensor]) -> nn.Module:
        """Minimise loss_of(step), then give the model its averaged weights."""
        started, first, mean = time.time(), self.step, None
        self.model.train()
        while self.step < self.steps:
            torch.manual_seed(self.step)
            u = self.step / self.steps
            for group in self.opt.param_groups:  # 2 % warm-up, then half a cosine
                rising, falling = min(1, u / 0.02 + 0.01), 0.01 + 0.99 * math.cos(u * math.pi / 2) ** 2
                group["lr"] = self.lr * rising * falling
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
                done = f"{self.name} {self.step}/{self.steps}  loss {mean:.4f}"
                print(f"{done}  {pace:.2f} s per step  {left:.0f} min left", flush=True)
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
        batch = torch.stack(
            [
                data[i, :, r : r + side, c : c + side]
                for i, r, c in zip(torch.randint(0, len(data), (b,)).tolist(), y, x, strict=True)
            ]
        )
        batch = to_float(batch)
        batch = torch.where(torch.rand(b, 1, 1, 1) < 0.5, batch, batch.flip(3))
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = (m.float() for m in vae.encode(batch))
            z = mean + torch.randn_like(mean) * (0.5 * logvar.clamp(-30, 20)).exp()
            out = vae.decode(z)
        out = out.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(out), edges(batch), strict=True))
        kl_weight = 3e-4 if step < 0.4 * steps else 1e-5  # kept at 3e-4, it leaves one of the four channels empty
        return (out - batch).abs().mean() + edge + kl_weight * kl

    report_vae(run.learn(loss_of))


def report_vae(vae: AutoencoderKL) -> None:
    """Standardise the latents, check the round trip with the judge, write the part."""
    scenes = scenes_from(HELD_OUT, 500)
    x = to_float(pictures(scenes, HELD_OUT))
    with torch.no_grad():
        standardise(vae, x)
        vae.half().float()  # what will be stored
        back = torch.cat([vae.decode(vae.encode(part)[0]) for part in x.split(50)]).clamp(-1, 1)
    error = (back - x).abs().mean().item() / 2
    judge = Judge.load()
    same = sum(a.keys() == b.keys() for a, b in zip(judge.read(x), judge.read(back), strict=True)) / len(x)
    print(f"vae: mean absolute error {error:.4f} of the range; the judge reads {same:.1%} of 500 round trips the same")
    if same < 0.98:
        raise SystemExit("vae: not written, 98% must read the same: train longer (--steps)")
    write_part(known.VAE, vae.state_dict())


def standardise(vae: AutoencoderKL, x: Tensor) -> None:
    """Fold a shift and a scale per channel into the 1x1 convolutions: scaled latents then have mean 0 and variance 1.

    SD's scale factor is then right for the miniature too, and the UNet sees the unit variance its noise schedule means.
    """
    latents = torch.cat([vae.encode(part)[0] for part in x.split(50)])
    mean, scale = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * SHAPES.vae.scale_factor  # (4,) each
    quant, post, z = vae.quant_conv, vae.post_quant_conv, SHAPES.vae.z_channels
    quant.bias[:z] -= mean
    quant.weight[:z] /= scale[:, None, None, None]
    quant.bias[:z] /= scale
    quant.bias[z:] -= 2 * scale.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= scale[:, None, None]


def train_judge(steps: int) -> None:
    """The detector of judge.py, on renders made a little noisy and a little blurred."""
    scenes = scenes_from(2, 6000)
    data, labels = pictures(scenes, 1_000_000), label_maps(scenes)
    judge = Judge()

    def loss_of(step: int) -> Tensor:
        i = torch.randint(0, len(data), (48,))
        x = to_float(data[i])
        x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1), torch.rand(48, 1, 1, 1))
        x = x + 0.12 * torch.rand(48, 1, 1, 1) ** 2 * torch.randn_like(x) + 0.05 * torch.randn(48, 3, 1, 1)
        kinds, where = judge(x)
        target = F.one_hot(labels[i].flatten(1), 1 + len(world.KINDS)).amax(1)[:, 1:].float()  # (48, 20)
        return F.binary_cross_entropy_with_logits(kinds, target) + 0.2 * F.cross_entropy(where, labels[i])

    Run("judge", judge, steps, lr=3e-3, ema=0.99).learn(loss_of)
    held_out = scenes_from(HELD_OUT, 1000)
    seen = [s for part in to_float(pictures(held_out, HELD_OUT)).split(100) for s in judge.half().float().read(part)]
    exact = sum(s.keys() == {o.kind for o in scene.objects} for s, scene in zip(seen, held_out, strict=True)) / len(
        seen
    )
    overlap = []
    for i, (s, scene) in enumerate(zip(seen, held_out, strict=True)):
        masks = torch.from_numpy(world.render(scene, HELD_OUT + i)[1])
        overlap += [
            (s[o.kind] & m).sum() / (s[o.kind] | m).sum()
            for o, m in zip(scene.objects, masks, strict=True)
            if o.kind in s
        ]
    print(f"judge: {exact:.1%} of 1000 held-out renders read exactly, mean mask IoU {torch.stack(overlap).mean():.3f}")
    if exact < 0.99:
        raise SystemExit("judge: not written, 99% must be read exactly: train longer (--steps)")
    save_file({k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}, FILE)


def label_maps(scenes: list[world.Scene]) -> Tensor:
    """(b, 32, 32) int64: 0 for the ground, 1 + k for kind k; a cell belongs to what covers its centre."""
    maps = torch.zeros(len(scenes), 32, 32, dtype=torch.int64)
    for i, scene in enumerate(scenes):
        for obj, mask in zip(scene.objects, world.render(scene)[1], strict=True):
            maps[i][torch.from_numpy(mask[2::4, 2::4].copy())] = 1 + world.KINDS.index(obj.kind)
    return maps


def train_text_unet(steps: int) -> None:
    """Noise prediction with min-SNR-5 weights and 10 % empty captions, on the latents of 12,000 scenes."""
    sd = AutoencoderKL(SHAPES.vae)
    sd.load_state_dict(read_part(known.VAE))
    scenes = scenes_from(3, 12000)
    with torch.no_grad():
        moments = [sd.encode(to_float(pictures(scenes[i : i + 50], 2_000_000 + i))) for i in range(0, len(scenes), 50)]
    mean = torch.cat([m for m, _ in moments]) * SHAPES.vae.scale_factor  # (12000, 4, 16, 16)
    std = torch.cat([(0.5 * v).exp() for _, v in moments]) * SHAPES.vae.scale_factor
    print(f"latents: mean {mean.mean():.3f}, standard deviation {mean.std():.3f}, posterior's {std.mean():.3f}")

    torch.manual_seed(0)
    text, unet = Text(SHAPES.text), UNet(SHAPES.unet)
    nn.init.normal_(text.transformer.get_input_embeddings().weight)
    for name, p in unet.named_parameters():  # each block starts as its shortcut
        if name.endswith(("out_layers.3.weight", "proj_out.weight", "out.2.weight")):
            nn.init.zeros_(p)
    alphas_cumprod = ddim.alphas_cumprod(SHAPES.schedule)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = snr.clamp(max=5) / snr
    # two colours of one shape are what the model mixes up longest: such scenes are drawn three times as often
    often = torch.tensor([1.0 + 2.0 * (len(s.objects) == 2 and len({o.shape for o in s.objects}) == 1) for s in scenes])

    def loss_of(step: int) -> Tensor:
        rng = random.Random(step)
        i = torch.multinomial(often, 32)
        x0 = mean[i] + std[i] * torch.randn_like(mean[i])
        captions = ["" if rng.random() < 0.1 else world.caption(scenes[k], rng) for k in i.tolist()]
        t = torch.randint(0, len(weights), (32,))
        noise = torch.randn_like(x0)
        x = ddim.add_noise(x0, noise, alphas_cumprod[t])
        # bfloat16 and plain attention, whose backward is faster at this size: 56 pictures a second, else 50
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            eps = unet(x, t, text(text.tokenize(captions)))
        return (weights[t] * (eps - noise).square().mean((1, 2, 3))).mean()

    both = nn.ModuleDict({"text": text.transformer, "unet": unet})
    Run("text+unet", both, steps, lr=1e-3, ema=0.9985).learn(loss_of)
    candidate = RUNS / MODEL.name
    shutil.copy(MODEL, candidate)
    write_part(known.TEXT, text.transformer.state_dict(), candidate)
    write_part(known.UNET, unet.state_dict(), candidate)
    accept(candidate)


def accept(candidate: Path) -> None:
    """Let the judge read 128 pictures of a finished model; it becomes the miniature if it draws what is asked."""
    sd, judge = dag.load(candidate), Judge.load()
    sets = world.prompt_sets(8, seed=5)
    entries = [e for name in world.NAMED for e in sets[name] for _ in range(4)]
    *_, last = dag.sample(sd, [prompt for prompt, _ in entries], dag.Guidance())
    result = following([asked for _, asked in entries], judge.read(sd.decode(last.x)))
    print(f"text+unet, shares of 128 pictures that show it: {result}")
    if result["all asked"] < 0.95 or result["nothing else"] < 0.9:
        raise SystemExit(
            f"text+unet: stays in {candidate}; 95% must show all that is asked for, 90% nothing else: train longer"
        )
    os.replace(candidate, MODEL)


def read_part(prefix: str) -> dict[str, Tensor]:
    """The tensors of shapes.safetensors below a prefix, float32."""
    return {k.removeprefix(prefix): v.float() for k, v in load_file(MODEL).items() if k.startswith(prefix)}


def write_part(prefix: str, tensors: dict[str, Tensor], path: Path = MODEL) -> None:
    """Replace the tensors below a prefix in a checkpoint, as float16."""
    kept = {k: v for k, v in load_file(path).items() if not k.startswith(prefix)} if path.exists() else {}
    new = {prefix + k: v.half().contiguous() for k, v in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(kept | new, temporary, {"config": SHAPES.name})


PARTS = {"judge": (train_judge, 800), "vae": (train_vae, 5000), "text+unet": (train_text_unet, 14500)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--steps", type=int, help="length of the whole run")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, steps = PARTS[args.part]
    torch.manual_seed(0)
    train(args.steps or steps)


if __name__ == "__main__":
    main()
