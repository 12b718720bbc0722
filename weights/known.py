"""What people have on their disks: published checkpoints of Stable Diffusion 1.x and 2.x, and what is taken for one.

Sizes and hashes are those that installers and manifests of public projects agree on.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from .checkpoint import Checkpoint, CheckpointError, sha256

# How the names of the networks' weights begin in an original checkpoint.
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
OLD_TEXT = "cond_stage_model.transformer."  # as community files made with early transformers have it
EMA = "model_ema.diffusion_model"  # the averaged UNet of training checkpoints, its names written without dots

# Entries of original checkpoints that are no weights of the model: schedule buffers (recomputed), EMA bookkeeping,
# the text encoder's position numbers, parts of CLIP that draw nothing, remnants of training.
TEXT2 = "cond_stage_model.model."  # OpenCLIP's text tower, of SD 2.x, and its names for ours
OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.", "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm.": "ln_final.",
    "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.", "self_attn.q_proj.": "attn.in_proj_", "self_attn.k_proj.": "attn.in_proj_",
    "self_attn.v_proj.": "attn.in_proj_",
}  # fmt: skip
IGNORED = (
    "betas", "alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_", "model_ema.", "logvar", "lvlb_weights",
    "scale_factor", TEXT + "embeddings.position_ids", OLD_TEXT + "embeddings.position_ids", "first_stage_model.loss.",
    OLD_TEXT + "text_projection", "cond_stage_model.logit_scale", "cond_stage_model.text_projection",
    OLD_TEXT + "vision_model.", OLD_TEXT + "visual_projection", OLD_TEXT + "logit_scale", "embedding_manager.",
    "first_stage_model.model_ema.", "denoiser.", TEXT2 + "transformer.resblocks.23.", TEXT2 + "text_projection",
    TEXT2 + "logit_scale", TEXT2 + "attn_mask",
)  # fmt: skip

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
    ("512-base-ema.ckpt", 5_214_864_007, "d635794c1fedfdfa261e065370bea59c651fc9bfa65dc6d67ad29e11869a1824"),
    ("768-v-ema.ckpt", 5_214_864_007, "bfcaf0755797b0c30eb00a3787e8b423eb1f5decd8de76c4d824ac2dd27e139f"),
    ("v2-1_512-ema-pruned.ckpt", 5_214_865_159, "88ecb782561455673c4b78d05093494b9c539fc6bfc08f3a9a4a0dd7b0b10f36"),
    ("v2-1_768-ema-pruned.ckpt", 5_214_865_159, "ad2a33c361c1f593c4a1fb32ea81afce2b5bb7d1983c6b94793a26a3b54b08a0"),
    (
        "v2-1_512-ema-pruned.safetensors",
        5_214_604_494,
        "df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2",
    ),
    (
        "v2-1_768-ema-pruned.safetensors",
        5_214_604_494,
        "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac",
    ),
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


XL = "conditioner.embedders."
FAMILIES = (  # what a file is, and with what a name begins that only such a file has; the first that fits counts
    ("an SDXL checkpoint", (XL + "1.",)),
    ("an SDXL refiner checkpoint", (XL + "0.model.",)),
    ("an SD 3 checkpoint", (UNET + "joint_blocks.", "joint_blocks.")),
    ("a FLUX checkpoint", (UNET + "double_blocks.", "double_blocks.")),
    ("a ControlNet", ("control_model.", "controlnet_")),
    ("an unCLIP checkpoint", (UNET + "label_emb.",)),
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
FIRST = UNET + "input_blocks.0.0.weight"
KEY = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
ADAPTERS = ("lora_", "lora.", ".hada_w1", ".lokr_w1")
CHANNELS = {5: "a depth-to-image checkpoint", 7: "an upscaler", 8: "an InstructPix2Pix", 9: "an inpainting checkpoint"}


def family(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The kind of file by its tensors' names and shapes, if it is no SD 1.x or 2.x; None if it may be."""
    first, key = shapes.get(FIRST, ()), shapes.get(KEY, ())
    if not first and any(part in name for name in shapes for part in ADAPTERS):
        return "a LoRA or the like, not a model"
    if len(first) == 4 and first[1] in CHANNELS:
        version = " of SD 2.x" if key[1:] == (1024,) else ""
        return f"{CHANNELS[first[1]]}{version} ({first[1]} input channels)"
    for what, beginnings in FAMILIES if first else FAMILIES + PARTS:
        if any(f"{name}.".startswith(beginnings) for name in shapes):
            return what
    alone = first and all(name.startswith(UNET) for name in shapes)
    return "a UNet alone" if alone else None


def recognise(file: Checkpoint, widths: dict[str, tuple[int, int, int]]) -> str:
    """The model that a file holds; a metadata entry `config` that names one overrides.

    widths: the models that may be, by name: the UNet's first channels, its input channels, the text's width.
    Raises CheckpointError.
    """
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    if file.metadata.get("config") in widths:
        return file.metadata["config"]
    if kind := family(shapes):
        raise CheckpointError(
            f"{file.path}: this is {kind}; expected an SD 1.x or 2.x checkpoint of the original layout"
        )
    first, key = shapes.get(FIRST, ()), shapes.get(KEY, ())
    if len(first) != 4 or len(key) != 2:
        file.refuse_foreign((FIRST, KEY))
        raise CheckpointError(
            f"{file.path}: no UNet of Stable Diffusion 1.x in it; found {len(shapes)} tensors "
            f"({first_three(sorted(shapes))})"
        )
    found = (first[0], first[1], key[1])
    if name := next((name for name, own in widths.items() if own == found), None):
        return name
    expected = " or ".join(f"{own[0]}, {own[1]} and {own[2]} ({name})" for name, own in widths.items())
    raise CheckpointError(
        f"{file.path}: a UNet of {found[0]} channels, {found[1]} input channels and text width {found[2]}; "
        f"expected {expected}"
    )


def locate(expected: Iterable[str], file: Checkpoint) -> dict[str, str]:
    """Our name of each tensor -> the file's. They differ for an averaged UNet, which is preferred, and for old text."""
    there = file.entries.keys() | file.foreign
    averaged = {name: EMA + name.removeprefix(UNET).replace(".", "") for name in expected if name.startswith(UNET)}
    if there.isdisjoint(averaged.values()):
        averaged = {}
    absent = [name for name in expected if name not in there]
    older = {name: name.replace(TEXT, OLD_TEXT) for name in absent}
    if any(name.startswith(TEXT2) for name in there):
        older = {name: open_clip_name(name) for name in absent if name.startswith(TEXT)}
    older = {name: old for name, old in older.items() if old in there}
    return {name: averaged.get(name) or older.get(name, name) for name in expected}


def open_clip_name(name: str) -> str:
    """The name in OpenCLIP's text tower of one of our text encoder's tensors."""
    name = name.removeprefix(TEXT)
    for ours, theirs in OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return TEXT2 + name


def third(ours: str, theirs: str) -> int | None:
    """Which third of the file's tensor is ours: OpenCLIP has the projections of q, k and v in one. None: all of it."""
    return "qkv".index(ours.split("self_attn.")[1][0]) if ".in_proj_" in theirs else None


def in_file(ours: str, theirs: str, x: Tensor) -> tuple[int, ...]:
    """The shape that a tensor of ours has in the file."""
    return tuple(x.shape) if third(ours, theirs) is None else (3 * len(x), *x.shape[1:])


def check_complete(where: dict[str, str], expected: dict[str, Tensor], file: Checkpoint, model: str) -> list[str]:
    """Every tensor of the model must be there, of its shape and kind. Returns the file's names that are not used.

    Warns of those whose origin is not known: with them the file may be of another model.
    where: our name -> the file's; expected: our name -> a tensor of the right shape. Raises CheckpointError.
    """
    file.refuse_foreign(where.values())
    used, entries = set(where.values()), file.entries
    # Whether the rest is of known origin: a UNet that was trained, beside its average; text under old and new names.
    rest = {
        name: name.startswith(IGNORED) or name in expected or name.replace(OLD_TEXT, TEXT) in expected
        for name in entries
        if name not in used
    }
    faults = {
        "missing": [name for name in where.values() if name not in entries],
        "of wrong shape": [
            f"{there} {entries[there].shape} instead of {shape}"
            for name, there in where.items()
            if there in entries and entries[there].shape != (shape := in_file(name, there, expected[name]))
        ],
        "not of floating point": [
            name for name in where.values() if name in entries and not entries[name].dtype.is_floating_point
        ],
    }
    found = "; ".join(f"{what}: {len(names)} ({first_three(names)})" for what, names in faults.items() if names)
    if found:
        raise CheckpointError(f"{file.path}: not a complete {model} checkpoint, tensors {found}")
    if strangers := [name for name, known_origin in rest.items() if not known_origin]:
        found = f"{len(strangers)} of unknown origin ({first_three(strangers)})"
        warnings.warn(f"{file.path}: tensors not used, {found}: it may draw otherwise elsewhere", stacklevel=3)
    return list(rest)


def first_three(names: list[str]) -> str:
    """The first three names, on one line whatever is in them."""
    shown = [name[:120].encode("unicode_escape").decode() for name in names[:3]]
    return ", ".join(shown) + (", ..." if len(names) > 3 else "")
