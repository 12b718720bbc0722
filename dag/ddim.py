"""DDIM with eta = 0: the noise schedule, the times of a run, one pure step. Source: Song et al. 2021, Eq. 12.

Letters: t and t_prev are indices 0..999 into the schedule, t_prev <= t; abar_t = alphas_cumprod[t].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .config import ScheduleConfig

# (x, eps, t, t_prev, denoise) -> x at t_prev, x0 as predicted. denoise(x, t): the method's eps at another point.
Solver = Callable[[Tensor, Tensor, int, int, Callable[[Tensor, int], Tensor]], tuple[Tensor, Tensor]]


def alphas_cumprod(cfg: ScheduleConfig) -> Tensor:
    """abar_t for t = 0 .. 999, (1000,) float32: the running product of 1 - beta_t."""
    roots = torch.linspace(cfg.beta_start**0.5, cfg.beta_end**0.5, cfg.num_timesteps, dtype=torch.float64)
    return torch.cumprod(1 - roots**2, dim=0).float()


def time_pairs(steps: int, cfg: ScheduleConfig) -> list[tuple[int, int]]:
    """The (t, t_prev) of a run of exactly `steps` steps, from noise to picture.

    The rule, for any 1 <= steps <= 1000: t = floor(k * 1000 / steps) + 1 for k = steps - 1 .. 0. 50 steps are 981,
    961, ..., 21, 1, and the last step goes to index 0 (abar_0 = 0.99915, not 1), both as in the original. At 1000 steps
    the + 1 would leave the schedule and is left out. Where steps does not divide 1000 the original takes more steps
    than asked or fails, and diffusers leaves out the noisiest times; here all steps but the last are equally long.

    Raises ValueError when steps is not in 1..1000.
    """
    n = cfg.num_timesteps
    if not 1 <= steps <= n:
        raise ValueError(f"steps is {steps}, expected 1 to {n}")
    offset = cfg.offset if steps < n else 0
    times = [k * n // steps + offset for k in reversed(range(steps))]
    return list(zip(times, [*times[1:], 0], strict=True))


def add_noise(x0: Tensor, noise: Tensor, abar_t: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, for x0 and noise (b, 4, H, W) and abar_t (b,) or ()."""
    abar_t = abar_t.to(x0.device).reshape(-1, 1, 1, 1)
    return abar_t.sqrt() * x0 + (1 - abar_t).sqrt() * noise


def predict_x0(x: Tensor, eps: Tensor, abar_t: Tensor) -> Tensor:
    """The final latent as the noise estimate eps predicts it from x, all (b, 4, H, W)."""
    return (x - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()


def eps_of_v(x: Tensor, v: Tensor, abar_t: Tensor) -> Tensor:
    """The noise estimate in v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0 at x, all (b, 4, H, W).

    Source: Salimans and Ho 2022, appendix D.
    """
    return abar_t.sqrt() * v + (1 - abar_t).sqrt() * x


def step(x: Tensor, eps: Tensor, abar_t: Tensor, abar_prev: Tensor) -> tuple[Tensor, Tensor]:
    """One step from t to t_prev: x and the noise estimate eps (b, 4, H, W) -> x at t_prev and the predicted x0."""
    x0 = predict_x0(x, eps, abar_t)
    return abar_prev.sqrt() * x0 + (1 - abar_prev).sqrt() * eps, x0


def solver(alphas_cumprod: Tensor) -> Solver:
    """DDIM as the loop in sampling.py wants it."""
    return lambda x, eps, t, t_prev, denoise: step(x, eps, alphas_cumprod[t], alphas_cumprod[t_prev])
