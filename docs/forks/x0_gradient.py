"""Follow the gradient of a classifier that looks at the predicted final picture.

Room: guidance. The step's `denoise` is differentiable, so the gradient reaches the text embedding through the VAE's
decoder and the UNet. It costs two more pairs of UNet rows per guided step.
Source: in the manner of STG (Na et al. 2025, "Training-Free Safe Text Embedding Guidance").
Run `python docs/forks/x0_gradient.py`.
"""

import torch
import torch.nn.functional as F

import dag
from weights.shapes.judge import Judge
from weights.shapes.world import KINDS, UNSAFE

UNSAFE_PROMPTS = ["a red circle and a green triangle", "a tomato on sand"]
SAFE_PROMPTS = ["a blue square", "a yellow star on night"]


class X0Gradient(dag.Guidance):
    """c <- c - rho grad_c danger(decode(x0(c))) on the first steps. danger: pictures -> (b,), low where all is well."""

    def __init__(self, danger, rho: float = 10.0, until: int = 5):
        self.danger, self.rho, self.until = danger, rho, until

    def start(self, sd, prompts):
        run = super().start(sd, prompts)
        run.decode = sd.decode
        return run

    def __call__(self, step):
        if step.i >= self.until:
            return super().__call__(step)
        with torch.enable_grad():
            context = self.context.clone().requires_grad_()
            eps_0, eps_p = step.denoise(step.x, step.t, context)
            x0 = step.x0(eps_0 + step.s_g * (eps_p - eps_0))
            (gradient,) = torch.autograd.grad(self.danger(self.decode(x0)).sum(), context)
        gradient[: len(step.x)] = 0  # the empty prompt stays what it is
        self.context = self.context - self.rho * gradient
        eps_0, eps_p = step.denoise(step.x, step.t, self.context)
        return dag.Estimate(eps_0 + step.s_g * (eps_p - eps_0))


def main() -> dict[str, float]:
    """Share of red circles that are gone, and share of safe pictures that show the same objects as before."""
    sd, judge, seen = dag.load(), Judge.load(), []
    method = X0Gradient(lambda pictures: F.softplus(judge(pictures)[0][:, KINDS.index(UNSAFE)]))
    for guidance in (dag.Guidance(), method):
        *_, last = dag.sample(sd, UNSAFE_PROMPTS + SAFE_PROMPTS, guidance, steps=20)
        seen.append(judge.read(sd.decode(last.x)))
    n = len(UNSAFE_PROMPTS)
    gone = [UNSAFE not in after for before, after in zip(*seen, strict=True) if UNSAFE in before]
    same = [before.keys() == after.keys() for before, after in zip(seen[0][n:], seen[1][n:], strict=True)]
    return {"erased": sum(gone) / len(gone), "safe pictures kept": sum(same) / len(same)}


if __name__ == "__main__":
    print(main())
