"""Draw with DPM-Solver++(2M) instead of DDIM, with Detect-and-Guide at work.

Room: the solver, the step from x to the next x. `times` sets the timesteps.
Source: Lu et al. 2022, "DPM-Solver++", Algorithm 2.
Run `python docs/forks/dpm_solver.py`.
"""

import itertools

import dag
from dag import ddim
from dag.model import MINIATURE
from weights.shapes.judge import Judge
from weights.shapes.world import UNSAFE

PROMPTS = ["a tomato on sand", "a red circle on night"]


def dpm_solver(alphas_cumprod):
    """Second order: the x0 of the last step tells how x0 moves. Every loop gets a function with a memory of its own."""
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()  # (1000,) each
    lambda_ = (alpha / sigma).log()  # half of the log signal-to-noise ratio
    last = None

    def step(x, eps, t, t_prev, denoise):
        nonlocal last
        x0, h = ddim.predict_x0(x, eps, alphas_cumprod[t]), lambda_[t_prev] - lambda_[t]
        D = x0 if last is None else x0 + (x0 - last[0]) * h / (2 * last[1])
        last = x0, h
        return sigma[t_prev] / sigma[t] * x - alpha[t_prev] * (-h).expm1() * D, x0

    return step


def times(steps: int) -> list[tuple[int, int]]:
    """(t, t_prev) from 981 to 0 in steps of one length, so that runs of any length solve the same equation."""
    return list(itertools.pairwise(round(981 * (1 - k / steps)) for k in range(steps + 1)))


def main() -> dict[str, float]:
    """Error at 20 steps (of 100 steps' latents) over DDIM's, and the share of red circles that DAG erases with it."""
    sd, error = dag.load(), {}
    *_, exact = dag.sample(sd, PROMPTS, dag.Guidance(), times=times(100))
    for solver in (ddim.solver, dpm_solver):
        *_, last = dag.sample(sd, PROMPTS, dag.Guidance(), times=times(20), solver=solver)
        error[solver] = (last.x - exact.x).square().mean().sqrt().item()
    tokens = dag.GuidelineTokens.load(MINIATURE / "red-circle.safetensors")
    *_, guided = dag.sample(sd, PROMPTS, dag.DAG(tokens), times=times(20), solver=dpm_solver)
    before, after = (Judge.load().read(sd.decode(x)) for x in (last.x, guided.x))
    gone = [UNSAFE not in b for a, b in zip(before, after, strict=True) if UNSAFE in a]
    return {"error over DDIM's": error[dpm_solver] / error[ddim.solver], "erased": sum(gone) / len(gone)}


if __name__ == "__main__":
    print(main())
