"""Released erased models in their published layouts, on the miniature's shapes with random weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

import dag
import sample
from dag.config import SD14, SHAPES
from tests.files import given, original, weight, write_ckpt, write_safetensors
from weights import known
from weights.checkpoint import CheckpointError
from weights.overlay import ANTISEXUAL, diffusers_name

BLOCKS = SHAPES.unet.num_res_blocks
BASE = original(SHAPES)  # the model under it, in the tests that do not need the trained one
OTHER = {name: weight(name, lazy.shape, seed=2) if lazy.shape else lazy for name, lazy in BASE.items()}
UNET = [name for name in BASE if name.startswith(known.UNET)]
TEXT = [name for name in BASE if name.startswith(known.TEXT) and "position_ids" not in name]


def theirs(name: str) -> str:
    return diffusers_name(name.removeprefix(known.UNET), BLOCKS)


def esd_full(folder):
    """Also SalUn's diffusers-nsfw-*.pt."""
    write_ckpt(folder / "x.pt", {theirs(name): OTHER[name] for name in UNET}, lightning=False)
    return folder / "x.pt", UNET


def esd_part(folder):
    """The 2025 code: trained Linear and Conv layers, without cross-attention; weights alone for what has no bias."""
    part = [name for name in UNET if "attn2" not in name and OTHER[name].make().ndim > 1]
    write_safetensors(folder / "x.safetensors", {theirs(name): OTHER[name] for name in part})
    return folder / "x.safetensors", part


def compvis(folder):
    """A whole model's flat state_dict; of it only the UNet is laid over."""
    write_ckpt(folder / "x.pt", OTHER, lightning=False)
    return folder / "x.pt", UNET


def selective_amnesia(folder):
    """Lightning, with an averaged UNet beside the trained one, in half precision."""
    averaged = {known.EMA + name.removeprefix(known.UNET).replace(".", ""): OTHER[name] for name in UNET}
    write_ckpt(folder / "x.ckpt", BASE | averaged)
    return folder / "x.ckpt", UNET


def mace(folder):
    """A pipeline's folder, whose UNet differs in to_k and to_v of the cross-attention only."""
    changed = [name for name in UNET if ".attn2.to_k." in name or ".attn2.to_v." in name]
    (folder / "unet").mkdir()
    unet = {theirs(name): (OTHER if name in changed else BASE)[name] for name in UNET}
    write_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", unet)
    (folder / "model_index.json").write_text("{}")
    return folder, changed


def adv_unlearn(folder, prefix="text_model."):
    names = {prefix + name.removeprefix(known.TEXT): OTHER[name] for name in TEXT}
    names[prefix + "embeddings.position_ids"] = given(torch.arange(SHAPES.text.max_length)[None])
    write_ckpt(folder / "pytorch_model.bin", names, lightning=False)
    return folder, TEXT


def adv_unlearn_drive(folder):
    """Its Drive file: a wrapper's names, and the same tensors again under aliases."""
    path, _ = adv_unlearn(folder, "text_encoder.text_model.")
    names = {"text_encoder.text_model." + name.removeprefix(known.TEXT): OTHER[name] for name in TEXT}
    alias = {name.replace("text_encoder.text_model.", "alias."): lazy for name, lazy in names.items()}
    write_ckpt(folder / "pytorch_model.bin", names | alias, lightning=False)
    return path / "pytorch_model.bin", TEXT


REPLACED = [esd_full, esd_part, compvis, selective_amnesia, mace, adv_unlearn, adv_unlearn_drive]


NAMES = {
    "time_embed.2.bias": "time_embedding.linear_2.bias",
    "input_blocks.0.0.weight": "conv_in.weight",
    "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
    "input_blocks.5.0.in_layers.2.weight": "down_blocks.1.resnets.1.conv1.weight",
    "input_blocks.4.1.norm.weight": "down_blocks.1.attentions.0.norm.weight",
    "middle_block.1.proj_in.weight": "mid_block.attentions.0.proj_in.weight",
    "middle_block.2.out_layers.3.weight": "mid_block.resnets.1.conv2.weight",
    "output_blocks.2.1.conv.bias": "up_blocks.0.upsamplers.0.conv.bias",
    "output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
    "output_blocks.11.0.skip_connection.weight": "up_blocks.3.resnets.2.conv_shortcut.weight",
    "out.0.weight": "conv_norm_out.weight",
}  # fmt: skip


def test_names():
    """Known pairs; no two names of SD 1.4 become one; 192 layers have a part in SPM. test_parity.py asks diffusers."""
    assert {name: diffusers_name(name, BLOCKS) for name in NAMES} == NAMES
    names = [name for name in original(SD14) if name.startswith(known.UNET)]
    assert len({theirs(name) for name in names}) == len(names) == 686
    assert sum(linear(name) and name.endswith(".weight") for name in names) == 192


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    write_safetensors(path, BASE)
    return path


def by_hand(changed: dict[str, torch.Tensor]) -> dag.StableDiffusion:
    return dag.StableDiffusion.from_tensors(SHAPES, lambda name: changed.get(name, BASE[name].make()))


def drawn(sd: dag.StableDiffusion) -> torch.Tensor:
    *_, last = dag.sample(sd, ["a red circle", "a star"], dag.Guidance(), 2, seeds=[0, 1])
    return last.x


@pytest.mark.parametrize("write", REPLACED, ids=lambda write: write.__name__)
def test_replaced(write, base, tmp_path):
    """The model is that with the same weights put in by hand, tensor by tensor and in what it draws."""
    path, changed = write(tmp_path)
    sd = dag.load(base, overlay=path)
    expected = by_hand({name: OTHER[name].make() for name in changed})
    own, wanted = sd.state_dict(), expected.state_dict()
    assert own.keys() == wanted.keys() and all(torch.equal(own[name], wanted[name]) for name in own)
    assert f"{len(changed)} of them differ" in sd.origin
    assert (drawn(sd) - drawn(expected)).abs().max() < 1e-4 < (drawn(sd) - drawn(dag.load(base))).abs().max()


def linear(name: str) -> bool:
    """Whether SPM has a part for it: the Linear and Conv layers of a transformer."""
    return "transformer_blocks" in name and "norm" not in name or ".proj_in." in name or ".proj_out." in name


def spm(folder, without: str | None = None):
    parts = {}
    for name in UNET:
        if not (linear(name) and name.endswith(".weight")):
            continue
        out, into, *rest = BASE[name].shape
        key = "lora_unet_" + theirs(name).removesuffix(".weight").replace(".", "_")
        parts[f"{key}.lora_down.weight"] = weight(key + "d", (1, into, *rest))
        parts[f"{key}.lora_up.weight"] = weight(key + "u", (out, 1, *[1 for _ in rest]))
        parts[f"{key}.alpha"] = given(torch.tensor(0.5))
    parts = {name: part for name, part in parts.items() if without is None or not name.endswith(without)}
    write_safetensors(folder / "x.safetensors", parts)
    return folder / "x.safetensors", {name: part.make() for name, part in parts.items()}


@pytest.mark.parametrize("m", [1.0, 0.5])
def test_spm(m, base, tmp_path):
    path, parts = spm(tmp_path)
    sd, changed = dag.load(base, overlay=path, strength=m), {}
    for name in (name for name in UNET if linear(name) and name.endswith(".weight")):
        key = "lora_unet_" + theirs(name).removesuffix(".weight").replace(".", "_")
        down, up = parts[f"{key}.lora_down.weight"], parts[f"{key}.lora_up.weight"]
        product = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view(BASE[name].shape)
        changed[name] = BASE[name].make() + m * m * 0.5 * product
    assert len(changed) == 12 * len(sd.unet.cross_attention()) == len(parts) / 3
    own, wanted = sd.state_dict(), by_hand(changed).state_dict()
    assert all(torch.allclose(own[name], wanted[name], atol=1e-6) for name in own)
    assert f"SPM at strength {m:g}, {len(changed)} tensors, {len(changed)} of them differ" in sd.origin


def sdid(folder, columns: int = 8):
    c = SHAPES.unet.model_channels * SHAPES.unet.channel_mult[-1]
    vectors = torch.randn(c * 4, columns, generator=torch.Generator().manual_seed(0))  # 2 x 2: an eighth of 16
    write_ckpt(folder / "unet.pth", {"controlnet.fc1.weight": given(vectors)}, lightning=False)
    return folder / "unet.pth", vectors[:, -1].view(c, 2, 2)


def test_sdid(base, tmp_path):
    """The prompts' rows alone, at every step; in `detect`, which knows one kind of row, that one."""
    path, vector = sdid(tmp_path)
    assert ANTISEXUAL == 7
    sd, plain = dag.load(base, overlay=path), dag.load(base)
    rows = []
    sd.unet.middle_block.register_forward_hook(lambda block, given, out: rows.append(out.clone()))
    before = []
    plain.unet.middle_block.register_forward_hook(lambda block, given, out: before.append(out.clone()))
    for model in (sd, plain):
        next(dag.sample(model, ["a red circle", "a star"], dag.Guidance(), 2, seeds=[0, 1]))
    apart = rows[0] - before[0]  # (4, c, 2, 2)
    assert (apart[:2] == 0).all() and torch.allclose(apart[2:], vector.expand(2, -1, -1, -1), atol=1e-5)
    tokens = dag.GuidelineTokens.from_text(sd, "a red circle", "a red circle")
    rows.clear(), before.clear()
    for model in (sd, plain):
        dag.detect(model, tokens, torch.zeros(1, 3, 128, 128), [501])
    assert torch.allclose(rows[0] - before[0], vector[None], atol=1e-5)
    with pytest.raises(ValueError, match="SDID's vector is for a middle of 2 x 2, this picture's is 1 x 2"):
        next(dag.sample(sd, ["a"], dag.Guidance(), 1, height=64, width=128))


def wrong_shape(folder):
    path, _ = esd_full(folder)
    write_ckpt(path, {theirs(name): weight(name, (1, *OTHER[name].shape)) for name in UNET}, lightning=False)
    return path


def sdxl(folder):
    path, names = esd_full(folder)
    more = {"add_embedding.linear_1.weight": weight("a", (4, 4))}
    write_ckpt(path, {theirs(name): OTHER[name] for name in names} | more, lightning=False)
    return path


def cut(folder):
    path, _ = esd_full(folder)
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def half_a_text(folder):
    path, _ = adv_unlearn(folder)
    some = {"text_model." + name.removeprefix(known.TEXT): OTHER[name] for name in TEXT[:9]}
    write_ckpt(folder / "pytorch_model.bin", some, lightning=False)
    return path


def text_file(folder):
    (folder / "x.pt").write_text("nothing")
    return folder / "x.pt"


def vae(folder):
    write_safetensors(folder / "x.safetensors", {"decoder.conv_in.weight": weight("v", (4, 4))})
    return folder / "x.safetensors"


def a_program(folder):
    class Call:
        def __reduce__(self):
            return open, (str(folder / "was-run"), "w")

    torch.save({"conv_in.weight": Call(), "conv_in.bias": torch.zeros(SHAPES.unet.model_channels)}, folder / "x.pt")
    return folder / "x.pt"


def empty_folder(folder):
    return folder


def short_unet(folder):
    write_ckpt(folder / "x.pt", {name: OTHER[name] for name in UNET[:50]}, lightning=False)
    return folder / "x.pt"


WRONG = {
    wrong_shape: "tensors are of wrong shape: another model's (time_embedding.linear_1.weight",
    sdxl: "1 tensors are not of SD 1.x's UNet (add_embedding.linear_1.weight)",
    cut: "its zip directory cannot be read",
    half_a_text: "tensors are missing (text_model.",
    text_file: "the file is of no known kind",
    vae: "fits no released erased model; found decoder.conv_in.weight",
    a_program: "its pickle calls",
    empty_folder: "a folder without a UNet or text encoder",
    short_unet: "tensors are missing (model.diffusion_model.",
    lambda folder: spm(folder, "lora_up.weight")[0]: "tensors are missing (lora_unet_",
    lambda folder: sdid(folder, 7)[0]: "1 tensors are of wrong shape (controlnet.fc1.weight)",
}


@pytest.mark.parametrize("write, said", WRONG.items(), ids=lambda x: getattr(x, "__name__", " "))
def test_wrong_files(write, said, base, tmp_path):
    path = write(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        dag.load(base, overlay=path)
    message = str(caught.value)
    assert said in message and str(tmp_path) in message and "\n" not in message and not (tmp_path / "was-run").exists()


def test_program(tmp_path, capsys):
    """Over the trained miniature, with DAG; the report says so, and the tokens are warned about where keys differ."""
    sd = dag.load()
    changed = {name: x * 1.02 for name, x in sd.unet.state_dict().items() if "attn2.to_v" in name}
    save_file(
        {diffusers_name(name, BLOCKS): x.half().contiguous() for name, x in changed.items()}, tmp_path / "x.safetensors"
    )
    argv = ["--overlay", str(tmp_path / "x.safetensors"), "--prompt", "a red circle", "--guidance", "none,dag"]
    assert sample.main([*argv, "--steps", "8", "--out", str(tmp_path / "o")]) == 0
    n = len(changed)
    said = f"x.safetensors laid over it: a part of a UNet by diffusers' names, {n} tensors, {n} of them differ"
    assert said in capsys.readouterr().out
    settings = json.loads((tmp_path / "o" / "report.json").read_text())["settings"]
    assert said in settings["origin"] and settings["overlay"].endswith("x.safetensors")
    assert sample.main(["--overlay", str(tmp_path / "none"), "--out", str(tmp_path / "o")]) == 1
    assert "no such file" in capsys.readouterr().err
