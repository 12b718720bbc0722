"""Released erased models, laid over SD 1.x while it is loaded. What a file is, is told by what is in it:

    names of the original layout            its UNet, the averaged one if there is one   SA; ESD's, SalUn's compvis-*.pt
    names of diffusers' UNet                these tensors, all or some of the UNet's     ESD, SalUn, UCE, MACE's folder
    text_model.*                            the text encoder, for every prompt           AdvUnlearn
    lora_unet_*.lora_down, lora_up, alpha   W + m^2 (alpha / rank) up down               SPM
    controlnet.fc1.weight                   a vector added to the middle block's output  SDID

Sources: the methods' repositories; diffusers' convert_ldm_unet_checkpoint for its names, which are a renaming of ours.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from dag.attention import Hook

from . import checkpoint, known
from .checkpoint import CheckpointError
from .known import TEXT, UNET, first_three

OUTSIDE = {  # ours -> diffusers', of what is in no block
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
TEXTS = "text_encoder.text_model.", "text_model."  # how the text encoder's names begin
LORA, SDID = "lora_unet_", "controlnet.fc1.weight"
ANTISEXUAL = 7  # the column of SDID's file that its paper evaluates; its concept_dict.json names all eight
FOLDERS = (  # files of a folder that are looked for, in this order
    "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "model.safetensors", "pytorch_model.bin",
)  # fmt: skip


def diffusers_name(name: str, num_res_blocks: int) -> str:
    """The name that diffusers has for a tensor of the UNet (ours: below `model.diffusion_model.`)."""
    for ours, theirs in OUTSIDE.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    if name.startswith("middle_block."):
        _, k, rest = name.split(".", 2)
        level, j = "mid_block", int(k) // 2  # ResBlock, SpatialTransformer, ResBlock
    else:
        kind, number, k, rest = name.split(".", 3)
        down = kind == "input_blocks"
        i, j = divmod(int(number) - down, num_res_blocks + 1)
        level = f"{'down' if down else 'up'}_blocks.{i}"
    layer, _, value = rest.rpartition(".")
    if layer in RESNET:
        return f"{level}.resnets.{j}.{RESNET[layer]}.{value}"
    if layer in ("op", "conv"):
        return f"{level}.{'downsamplers' if layer == 'op' else 'upsamplers'}.0.conv.{value}"
    return f"{level}.attentions.{j}.{rest}"


class MiddleShift(Hook):
    """SDID: a vector (c, H/8, W/8) is added to the middle block's output in the prompts' rows, at every step."""

    def __init__(self, unet: nn.Module, vector: Tensor):
        self.vector = vector
        unet.middle_block.register_forward_hook(self.shifted)

    def shifted(self, block: nn.Module, given: tuple, out: Tensor) -> Tensor:
        """out (b, c, H/8, W/8) of the block with the vector added. Raises ValueError for another size of picture."""
        if out.shape[1:] != self.vector.shape:
            sizes = " x ".join(map(str, self.vector.shape[1:])), " x ".join(map(str, out.shape[2:]))
            raise ValueError(
                f"SDID's vector is for a middle of {sizes[0]}, this picture's is {sizes[1]}; expected 512 x 512"
            )
        out = out.clone()
        out[self.call.cond] += self.vector.to(out)
        return out


class Overlay:
    """An open file of an erased model, and what it makes of the tensors of the model under it.

    expected: the model's tensors by their full names, for their shapes. strength: SPM's m, 1 as most users apply it;
    its own program takes a similarity of prompt and concept. Raises CheckpointError for a file that does not fit.
    """

    def __init__(self, path: str | Path, expected: dict[str, Tensor], num_res_blocks: int, strength: float = 1.0):
        self.path, self.expected, self.strength, self.differ = Path(path), expected, strength, 0
        self.file = checkpoint.read(self.inside(self.path))
        there = self.file.entries.keys() | self.file.foreign
        unet = [name for name in expected if name.startswith(UNET)]
        theirs = {name: diffusers_name(name.removeprefix(UNET), num_res_blocks) for name in unet}
        texts = next((prefix for prefix in TEXTS if any(name.startswith(prefix) for name in there)), None)
        if any(name.startswith((UNET, known.EMA)) for name in there):
            self.where = known.locate(unet, self.file)
            self.kind = "a UNet of the original layout"
            self.kind += ", averaged" if any(name.startswith(known.EMA) for name in self.where.values()) else ""
        elif not there.isdisjoint(theirs.values()):
            self.where = {ours: name for ours, name in theirs.items() if name in there}
            self.refuse(sorted(there - set(theirs.values())), "not of SD 1.x's UNet")
            self.kind = f"{'the whole' if len(self.where) == len(unet) else 'a part of a'} UNet by diffusers' names"
        elif any(name.startswith(LORA) for name in there):
            keys = {name: LORA + theirs[name].removesuffix(".weight").replace(".", "_") for name in unet}
            self.where = {name: key for name, key in keys.items() if f"{key}.lora_down.weight" in there}
            parts = {
                f"{key}.{part}"
                for key in self.where.values()
                for part in ("lora_down.weight", "lora_up.weight", "alpha")
            }
            self.refuse(sorted(parts - there), "missing")
            self.refuse(sorted(there - parts), "not of SD 1.x's UNet")
            self.kind = f"SPM at strength {strength:g}"
        elif SDID in there:
            self.where, self.kind = {}, f"SDID's vector {ANTISEXUAL}"
        elif texts is not None:
            self.where = {name: texts + name.removeprefix(TEXT) for name in expected if name.startswith(TEXT)}
            self.kind = "a text encoder"
        else:
            raise CheckpointError(
                f"{path}: fits no released erased model; found {first_three(sorted(there))}; expected a UNet, a text "
                "encoder, SPM or SDID for SD 1.x"
            )
        self.check()

    @staticmethod
    def inside(path: Path) -> Path:
        """The file itself, or the one in a folder (of a pipeline: its UNet)."""
        if not path.is_dir():
            return path
        if file := next((path / name for name in FOLDERS if (path / name).is_file()), None):
            return file
        raise CheckpointError(
            f"{path}: a folder without a UNet or text encoder; expected {FOLDERS[0]} or the like in it"
        )

    def refuse(self, names: list[str], why: str) -> None:
        if names:
            raise CheckpointError(
                f"{self.path}: looks like an erased model, but {len(names)} tensors are {why} ({first_three(names)})"
            )

    def check(self) -> None:
        """Raises CheckpointError if tensors are missing, of another shape, or made by calling something."""
        entries = self.file.entries
        if self.kind.startswith("SPM"):
            self.file.refuse_foreign(self.file.foreign)
            for ours, key in self.where.items():
                down, up, alpha = (
                    entries[f"{key}.{part}"].shape for part in ("lora_down.weight", "lora_up.weight", "alpha")
                )
                out, into, *rest = self.expected[ours].shape
                fits = (down[1:], up, alpha) == ((into, *rest), (out, down[0], *rest), ()) and len(down) > 1
                self.refuse([] if fits else [key], "of wrong shape")
            return
        if not self.where:
            c = len(self.expected[UNET + "middle_block.0.in_layers.0.weight"])
            shape = entries[SDID].shape if SDID in entries else ()
            grid = round((shape[0] / c) ** 0.5) if len(shape) == 2 else 0
            self.refuse([] if len(shape) == 2 and shape == (c * grid**2, 8) and grid else [SDID], "of wrong shape")
            self.grid = grid
            return
        self.file.refuse_foreign(self.where.values())
        self.refuse([name for name in self.where.values() if name not in entries], "missing")
        wrong = [theirs for ours, theirs in self.where.items() if entries[theirs].shape != self.expected[ours].shape]
        self.refuse(wrong, "of wrong shape: another model's")

    def over(self, name: str, base: Tensor) -> Tensor:
        """What is used in the place of the model's tensor `name`."""
        if name not in self.where:
            return base
        theirs, read = self.where[name], self.file.tensor
        if self.kind.startswith("SPM"):
            down, up = (
                read(f"{theirs}.lora_{part}.weight").float() for part in ("down", "up")
            )  # (rank, ...), (out, rank)
            scale = self.strength**2 * read(f"{theirs}.alpha").item() / len(down)
            change = scale * (up.flatten(1) @ down.flatten(1)).view(base.shape)
            new = (base.float() + change.to(base.device)).to(base.dtype)
        else:
            new = read(theirs, base.device, base.dtype)
        self.differ += not torch.equal(new, base)
        return new

    def hooks(self, unet: nn.Module) -> tuple[Hook, ...]:
        """What it adds to every UNet call."""
        if self.where:
            return ()
        vector = self.file.tensor(SDID)[:, ANTISEXUAL].float()  # (c*H/8*W/8,)
        return (MiddleShift(unet, vector.view(-1, self.grid, self.grid)),)

    def __str__(self) -> str:
        what = f"{len(self.where)} tensors, {self.differ} of them differ" if self.where else "no weights differ"
        return f"{self.path.name} laid over it: {self.kind}, {what}"
