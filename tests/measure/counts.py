"""What a step sends to a device, what the host reads there and how much memory it takes, counted on a pretended one.

    python -m tests.measure.counts

Operations are those of SD 1.4 at 512 x 512, without views; a call of scaled_dot_product_attention is one. The networks'
tensors have sizes but no values there, so it takes half a minute. Host reads are counted on the miniature, which really
runs. It needs the `parity` extra.
Memory is that of tensors alive at once; a GPU needs about half a GiB more, for its context and its libraries.
"""

import gc
import weakref

import torch
import torch.nn.functional as F

import dag
from dag.cam import Probe
from dag.config import SD14
from dag.model import StableDiffusion
from dag.tokens import GuidelineTokens, Reading, fingerprint
from tests import references
from tests.pretended import Pretended, Tensor, mapped, tensors
from tests.test_device import CASES, counted


class Sizes(Pretended):
    """A pretended device on which what is computed from memory without values has none either.

    alive, peak: bytes of its tensors, now and at most.
    """

    def __init__(self):
        super().__init__()
        self.owners, self.alive, self.peak = set(), 0, 0

    def run(self, func, args, kwargs, given):
        out = super().run(func, args, kwargs, given)
        for t in tensors(out):
            if isinstance(t, Tensor):
                self.own(t.memory.untyped_storage())
        return out

    def own(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.owners:
            return
        self.owners.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def free() -> None:
            self.owners.remove(key)
            self.alive -= size

        weakref.finalize(storage, free)

    def on_memory(self, func, name, args, kwargs):
        if any(isinstance(t, Tensor) and t.memory.is_meta for t in tensors((args, kwargs))):
            args, kwargs = mapped(without_values, args), mapped(without_values, kwargs)
            if func is F.scaled_dot_product_attention:  # a GPU's has the layout (b, n, h, d), which merges at no cost
                return args[0].memory.transpose(1, 2).contiguous().transpose(1, 2)  # (b, h, n, d)
        return super().on_memory(func, name, args, kwargs)


def without_values(t: torch.Tensor) -> torch.Tensor:
    return Tensor(t.memory.to("meta")) if isinstance(t, Tensor) else t


def model(dtype: torch.dtype) -> StableDiffusion:
    """SD 1.4 without values, but for the keys that tokens are read with."""
    with torch.device("meta"):
        parts = StableDiffusion(SD14).parts()
    sizes = {prefix + name: p.to(dtype) for prefix, part in parts.items() for name, p in part.state_dict().items()}
    values = {name: torch.zeros(p.shape, dtype=dtype) for name, p in sizes.items() if "attn2.to_k" in name}
    return StableDiffusion.from_tensors(SD14, lambda name: Tensor((sizes | values)[name]))


def quiet(sd: StableDiffusion) -> None:
    """Let the UNet answer with zeros from now on, after doing all its work, and show nothing in the maps."""
    forward = sd.unet.forward

    def answer(x, t, context, hooks=()):
        eps = forward(x, t, context, hooks)
        for probe in hooks:
            probe.maps = {layer: Tensor(torch.zeros(A.shape)) for layer, A in probe.maps.items()}
        return Tensor(torch.zeros(eps.shape))

    sd.unet.forward = answer


def concepts(sd: StableDiffusion, count: int) -> list[GuidelineTokens]:
    """Tokens of 8 background and 8 concept rows each, as train_tokens.py makes them."""
    made, reading = torch.randn(16, SD14.unet.context_dim), Reading(SD14.cam_factors)
    constants = dict(background=8, levels=(1,), lo=(0.5,), hi=(0.6,))
    return [GuidelineTokens(made, f"{k}", "", reading, fingerprint(sd), **constants) for k in range(count)]


@torch.no_grad()
def operations(dtype: torch.dtype) -> dict[str, int]:
    found = {}
    with Sizes() as device:
        sd = model(dtype)
        x = torch.zeros(2, 4, 64, 64, dtype=dtype, device=device.device)
        t = torch.full((len(x),), 981, device=x.device)
        context, tokens = sd.text.encode(["", "a prompt"]), concepts(sd, 2)
        unets = {"diffusers": (references.diffusers_unet(sd), []), "ours": (sd.unet, [])}
        for count in (1, 2):
            unets[f"ours, with maps of {count}"] = (sd.unet, [[Probe(sd.unet, tokens[:count])]])
        for name, (unet, hooks) in unets.items():
            device.reset()
            unet(x, t, context, *hooks)
            found[f"UNet, {name}"] = device.sent
        quiet(sd)
        methods = {"plain": dag.Guidance(), "DAG of 1": dag.DAG(*tokens[:1]), "DAG of 2": dag.DAG(*tokens)}
        for name, method in methods.items():
            loop = dag.sample(sd, ["a prompt"], method, 3)
            next(loop)
            device.reset()
            step = next(loop)
            assert not step.guided.any()
            found[f"step, {name}"] = device.sent
    return found


@torch.no_grad()
def memory() -> None:
    """Prints GiB in float16: of the weights, and what each phase takes beside them."""
    with Sizes() as device:
        sd = model(torch.float16)
        for p in sd.parameters():
            device.own(p.memory.untyped_storage())
        weights = device.alive
        print(f"\n| GiB beside the weights' {weights / 2**30:.2f} | encode | UNet, with maps | decode | all, at most |")
        print("|---|---|---|---|---|")
        for side, b in ((512, 1), (512, 4), (768, 1), (768, 4)):
            x = torch.zeros(2 * b, 4, side // 8, side // 8, device=device.device)
            context, t = sd.text.encode(["a prompt"] * 2 * b), torch.full((2 * b,), 981, device=x.device)
            probe = Probe(sd.unet, concepts(sd, 1))
            phases = (
                (sd.vae.encode, torch.zeros(1, 3, side, side, dtype=sd.dtype, device=device.device)),  # one by one
                (sd.unet, x, t, context, [probe]),
                (sd.vae.decode, x[:1].to(sd.dtype)),
            )
            peaks = []
            for phase, *given in phases:
                gc.collect()
                device.peak = device.alive
                phase(*given)
                peaks.append(device.peak - weights)
            said = " | ".join(f"{peak / 2**30:.2f}" for peak in (*peaks, weights + max(peaks)))
            print(f"| {side} x {side}, batch {b} | {said} |", flush=True)


def main() -> None:
    single, half = operations(torch.float32), operations(torch.float16)
    print("| operations sent | float32 | float16 |\n|---|---|---|")
    for name, sent in single.items():
        over = [f" ({n[name] / n['step, plain'] - 1:+.1%})" if "DAG" in name else "" for n in (single, half)]
        print(f"| {name} | {sent}{over[0]} | {half[name]}{over[1]} |")
    print("\n| host reads a step | nothing found | found |\n|---|---|---|")
    with Pretended() as device:
        for b, count in CASES:
            few, many = (counted(b, count, find, device)[1] for find in (False, True))
            print(f"| {b} pictures, {count} concepts | {few} | {many} |")
    memory()


if __name__ == "__main__":
    main()
