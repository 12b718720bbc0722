"""SD 2.1: its file's layout, its prediction of v, its padding, on random weights. test_parity.py asks diffusers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import dag
from dag import DAG, Guidance, GuidelineTokens, ddim
from dag.config import SD21, SD21_V, SHAPES
from dag.model import StableDiffusion
from kernels import choice
from tests.files import half, original, weight, write_ckpt, write_safetensors
from weights import known
from weights.checkpoint import CheckpointError
from weights.known import OPEN_CLIP, TEXT2, UNET, open_clip_name

UNET21 = replace(SHAPES.unet, num_heads=None, head_channels=16, linear=True, context_dim=96)
TEXT21 = replace(SHAPES.text, hidden_size=96, act="gelu", pad=0)
TINY = replace(SHAPES, name=SD21.name, unet=UNET21, text=TEXT21)
TINY_V = replace(TINY, name=SD21_V.name, prediction="v")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr("dag.model.SD21", TINY)
    monkeypatch.setattr("dag.model.SD21_V", TINY_V)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd21") / "v2-1.ckpt"
    write_ckpt(path, original(TINY))
    return path


def by_our_names() -> StableDiffusion:
    entries = original(replace(TINY, text=replace(TEXT21, pad=None)))
    return StableDiffusion.from_tensors(TINY, lambda name: entries[name].make())


@pytest.mark.parametrize("kind", ["ckpt", "safetensors, half"])
def test_files(kind, file, tmp_path):
    """OpenCLIP's names, in which q, k and v are one; its 24th layer and projection are known to draw nothing."""
    if kind != "ckpt":
        file = tmp_path / "x.safetensors"
        write_safetensors(file, half(original(TINY)))
    names = original(TINY)
    assert TEXT2 + "transformer.resblocks.0.attn.in_proj_weight" in names and TEXT2 + "positional_embedding" in names
    sd, expected = dag.load(file, prediction="eps"), by_our_names().state_dict()
    own = sd.state_dict()
    assert own.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(own[name], x if kind == "ckpt" else x.half().float()), name
    assert sd.origin == "SD 2.1 base" and any(".resblocks.23." in name for name in sd.ignored)


def test_names_of_the_text_tower():
    """Every name of ours becomes one of OpenCLIP's, and no two but q, k and v the same."""
    names = [name for name in original(replace(TINY, text=replace(TEXT21, pad=None))) if name.startswith(known.TEXT)]
    names = [name for name in names if "position_ids" not in name]
    theirs = {name: open_clip_name(name) for name in names}
    assert not any(ours in name for ours in OPEN_CLIP for name in theirs.values())
    merged = [name for name in names if "q_proj" in name or "k_proj" in name]
    assert len(set(theirs.values())) == len(names) - len(merged)
    one = known.TEXT + "encoder.layers.1.{}"
    pairs = {
        "self_attn.k_proj.bias": "attn.in_proj_bias", "self_attn.out_proj.weight": "attn.out_proj.weight",
        "layer_norm2.bias": "ln_2.bias", "mlp.fc1.weight": "mlp.c_fc.weight",
    }  # fmt: skip
    for ours, name in pairs.items():
        assert theirs[one.format(ours)] == f"{TEXT2}transformer.resblocks.1.{name}"


def test_the_prediction_is_asked_for(file):
    with pytest.raises(CheckpointError) as caught:
        dag.load(file)
    assert "nothing in it tells what its UNet predicts; expected --prediction eps" in str(caught.value)
    with pytest.raises(CheckpointError, match="is shapes, which predicts eps; leave out --prediction v"):
        dag.load(prediction="v")
    assert dag.load(file, prediction="v").config is TINY_V


def test_padding(file):
    """Token 0 behind the end token; SD 1.x repeats the end token."""
    text, first = dag.load(file, prediction="eps").text, dag.load().text
    ids, others = text.tokenize(["a red circle", ""]), first.tokenize(["a red circle", ""])
    end = text.tokenizer.eos_token_id
    assert ids[:, :5].tolist() == [[*others[0, :4].tolist(), end], [others[1, 0].item(), end, 0, 0, 0]]
    assert (ids[0, 5:] == 0).all() and (others[0, 5:] == end).all()
    full = ["a star " * 40]  # has no padding
    assert torch.equal(text.tokenize(full), first.tokenize(full))


def test_v():
    """v of a known latent and noise tells that noise; in the loop the UNet's output is taken for v."""
    x0, eps, abar = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor(0.3)
    x = ddim.add_noise(x0, eps, abar)
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
    assert torch.allclose(ddim.eps_of_v(x, v, abar), eps, atol=1e-6)
    sd = by_our_names()
    sd.config = TINY_V
    seen = []
    sd.unet.register_forward_hook(lambda unet, given, out: seen.append((given[0], out)))
    (step, *_) = dag.sample(sd, ["a red circle"], Guidance(), 1, scale=3.0)
    (x, (v_0, v_p)), abar = seen[0], sd.alphas_cumprod[step.t]
    combined = ddim.eps_of_v(x[:1], (v_0 + 3 * (v_p - v_0))[None], abar)
    assert torch.allclose(step.x, ddim.step(x[:1], combined, abar, sd.alphas_cumprod[0])[0], atol=1e-4)


def test_dag(file, tmp_path):
    """Nothing found is plain guidance, bit for bit; where something is, the safety text's v is asked for."""
    sd = dag.load(file, prediction="v")
    tokens = GuidelineTokens.from_text(sd, "a red circle", "a red circle")
    tokens = replace(tokens, normalisation="fitted", levels=(1,), lo=(2.0,), hi=(3.0,))
    *_, plain = dag.sample(sd, ["a", "a star"], Guidance(), 3)
    *_, nothing = dag.sample(sd, ["a", "a star"], DAG(tokens), 3)
    assert torch.equal(plain.x, nothing.x) and nothing.unet_rows.tolist() == [2, 2]
    scaling = replace(sd.config.dag.scaling, min_area=0.0, full=1.01)
    found = replace(tokens, lo=(0.2,), hi=(0.5,))
    *_, guided = dag.sample(sd, ["a", "a star"], DAG(found, cfg=replace(sd.config.dag, warmup=0, scaling=scaling)), 3)
    assert guided.guided.all() and guided.unet_rows.tolist() == [3, 3] and not torch.equal(plain.x, guided.x)
    assert dag.detect(sd, found, torch.zeros(1, 3, 128, 128), [501]).shape == (1, 16, 16)


RELATIVES = {
    "an unCLIP checkpoint": {UNET + "label_emb.0.0.weight": weight("l", (4, 4))},
    "an inpainting checkpoint of SD 2.x (9 input channels)": 9,
    "a depth-to-image checkpoint of SD 2.x (5 input channels)": 5,
    "an upscaler of SD 2.x (7 input channels)": 7,
    "an SDXL checkpoint": {"conditioner.embedders.1.model.ln_final.weight": weight("x", (4,))},
}


@pytest.mark.parametrize("what, change", RELATIVES.items(), ids=lambda x: x if isinstance(x, str) else "")
def test_relatives(what, change):
    shapes = {known.FIRST: (320, 4, 3, 3), known.KEY: (320, 1024), TEXT2 + "ln_final.weight": (1024,)}
    assert known.family(shapes) is None
    shapes |= {known.FIRST: (320, change, 3, 3)} if isinstance(change, int) else dict.fromkeys(change, (4,))
    assert known.family(shapes) == what


def test_the_kernel_is_tried_on_the_finest_grid(monkeypatch):
    """Heads are as wide on every level there, so one trial stands for all."""
    sizes = ((2, 10), (4, 20), (2, 10))
    layers = [SimpleNamespace(factor=f, name="", num_heads=h, to_v=torch.nn.Linear(1, 64 * h)) for f, h in sizes]
    unet = SimpleNamespace(cross_attention=lambda: layers)
    sd = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, unet=unet, config=SD21_V)
    tokens = SimpleNamespace(embedding=torch.zeros(16, 1), split=(8, 8), reading=dag.tokens.Reading((2, 4), "mean"))
    monkeypatch.setattr("kernels.cross_attention.obstacle", lambda *given: None)
    asked = []
    monkeypatch.setattr(choice, "judged", lambda *given: asked.append(given[2:]) or choice.Verdict(True, "it is right"))
    fused, said = choice.for_run("auto", sd, [tokens])
    assert fused is not None and asked == [(10, [8, 8], {64: 48 * 48})]
