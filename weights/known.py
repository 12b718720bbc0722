"""What people have on their disks: the published checkpoints of Stable Diffusion 1.x, and what is often taken for one.

Sizes and hashes are those that installers and manifests of public projects agree on.
"""

from pathlib import Path

from .checkpoint import CheckpointError, sha256

PUBLISHED = (  # name, bytes, sha256
    ("sd-v1-4.ckpt", 4_265_380_512, "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556"),
    ("v1-5-pruned-emaonly.ckpt", 4_265_380_512, "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516"),
    (
        "v1-5-pruned-emaonly.safetensors",
        4_265_146_304,
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    ),
    ("sd-v1-4-full-ema.ckpt", 7_703_807_346, "14749efc0ae8ef0329391ad4436feb781b402f4fece4883c7ad8d10556d8a36a"),
    ("v1-5-pruned.ckpt", 7_703_807_346, "e1441589a6f3c5a53f5f54d0975a18a7feb7cdf0b0dee276dfc3331ae376a053"),
    ("v1-5-pruned.safetensors", 7_703_324_286, "1a189f0be69d6106a48548e7626207dddd7042a418dbf372cefd05e0cdba61b6"),
)
UNKNOWN = "unknown SD 1.x checkpoint"


def by_size(size: int) -> str:
    """The published files of a size, joined by "or"; UNKNOWN if there is none."""
    return " or ".join(name for name, n, _ in PUBLISHED if n == size) or UNKNOWN


def verify(path: str | Path, progress=lambda n: None) -> str:
    """Hash a whole file and return the name under which it was published.

    Raises CheckpointError when the hash is not a published one: the file is damaged, altered or somebody else's.
    """
    size, found = Path(path).stat().st_size, sha256(path, progress)
    for name, _, published in PUBLISHED:
        if found == published:
            return name
    guess = by_size(size)
    hint = "" if guess == UNKNOWN else f", though of the size of {guess}"
    raise CheckpointError(
        f"{path}: not a published file known here{hint}: sha256 {found}; download it again, or leave out --verify "
        "to use it anyway"
    )


UNET, XL, TEXT2 = "model.diffusion_model.", "conditioner.embedders.", "cond_stage_model.model."
FAMILIES = (  # what a file is, and with what a name begins that only such a file has; the first that fits counts
    ("an SDXL checkpoint", (XL + "1.",)),
    ("an SDXL refiner checkpoint", (XL + "0.model.",)),
    ("an SD 3 checkpoint", (UNET + "joint_blocks.", "joint_blocks.")),
    ("a FLUX checkpoint", (UNET + "double_blocks.", "double_blocks.")),
    ("a ControlNet", ("control_model.", "controlnet_")),
    ("an SD 2.x checkpoint", (TEXT2,)),
)
PARTS = (  # the same, if there is no UNet beside it
    ("a diffusers-format UNet", ("down_blocks.", "mid_block.", "up_blocks.")),
    ("a diffusers-format VAE", ("encoder.down_blocks.", "decoder.up_blocks.")),
    ("a text encoder alone", ("text_model.", "embeddings.token_embedding.", "token_embedding.", "cond_stage_model.")),
    ("a UNet alone", ("diffusion_model.", "input_blocks.")),
    ("a file of guideline tokens, which go to --tokens", ("embedding.",)),
    ("a textual-inversion embedding", ("emb_params.", "<")),
    ("a VAE alone", ("encoder.down.", "decoder.up.", "first_stage_model.")),
)
ADAPTERS = ("lora_", "lora.", ".hada_w1", ".lokr_w1")
CHANNELS = {5: "a depth-to-image checkpoint", 7: "an upscaler", 8: "an InstructPix2Pix", 9: "an inpainting checkpoint"}


def family(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """What a file is that is no SD 1.x checkpoint, by the names and shapes of its tensors; None if it may be one."""
    first = shapes.get(UNET + "input_blocks.0.0.weight", ())
    key = shapes.get(UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", ())
    if not first and any(part in name for name in shapes for part in ADAPTERS):
        return "a LoRA or the like, not a model"
    if len(first) == 4 and first[1] in CHANNELS:
        version = " of SD 2.x" if key[1:] == (1024,) else ""
        return f"{CHANNELS[first[1]]}{version} ({first[1]} input channels)"
    if key[1:] == (1024,):
        return "an SD 2.x checkpoint (text width 1024)"
    for what, beginnings in FAMILIES if first else FAMILIES + PARTS:
        if any(f"{name}.".startswith(beginnings) for name in shapes):
            return what
    alone = first and all(name.startswith(UNET) for name in shapes)
    return "a UNet alone" if alone else None
