"""Other people's implementations with our weights in them: diffusers' UNet and VAE, open_clip's and torch's text tower.

They share memory with ours, so that both fit at full size.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dag.config import Config
from dag.model import StableDiffusion
from dag.text import Text
from tests.files import original
from weights.known import UNET, VAE

os.environ["HF_HUB_OFFLINE"] = "1"
import diffusers  # noqa: E402
from diffusers.loaders import single_file_utils as convert  # noqa: E402


def random_model(config: Config) -> StableDiffusion:
    """A model of a config with the random weights of tests/files.py, made without a file."""
    entries = original(replace(config, text=replace(config.text, pad=None)))  # by our names
    return StableDiffusion.from_tensors(config, lambda name: entries[name].make())


def unet_config(cfg: Config) -> dict:
    return dict(
        block_out_channels=tuple(cfg.unet.model_channels * m for m in cfg.unet.channel_mult),
        layers_per_block=cfg.unet.num_res_blocks, use_linear_projection=cfg.unet.linear,
        attention_head_dim=tuple(cfg.unet.heads(cfg.unet.model_channels * m) for m in cfg.unet.channel_mult),
        cross_attention_dim=cfg.unet.context_dim, norm_num_groups=cfg.unet.num_groups,
        sample_size=cfg.size // cfg.vae.factor,
    )  # fmt: skip


def vae_config(cfg: Config) -> dict:
    n = len(cfg.vae.ch_mult)
    return dict(
        block_out_channels=tuple(cfg.vae.ch * m for m in cfg.vae.ch_mult), layers_per_block=cfg.vae.num_res_blocks,
        latent_channels=cfg.vae.z_channels, norm_num_groups=cfg.vae.num_groups, sample_size=cfg.size,
        down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n,
    )  # fmt: skip


def _filled(kind: type, config: dict, to_theirs: Callable[[dict, dict], dict], state: dict) -> nn.Module:
    with torch.device("meta"):
        model = kind(**config)
    model.load_state_dict(to_theirs(state, dict(model.config)), strict=True, assign=True)
    return model.eval().requires_grad_(False)


def diffusers_unet(sd: StableDiffusion) -> nn.Module:
    config, state = unet_config(sd.config), sd.unet.state_dict(prefix=UNET)
    return _filled(diffusers.UNet2DConditionModel, config, convert.convert_ldm_unet_checkpoint, state)


def diffusers_vae(sd: StableDiffusion) -> nn.Module:
    config, state = vae_config(sd.config), sd.vae.state_dict(prefix=VAE)
    return _filled(diffusers.AutoencoderKL, config, convert.convert_ldm_vae_checkpoint, state)


def scheduler(cfg: Config, steps: int) -> "diffusers.DDIMScheduler":
    made = diffusers.DDIMScheduler(
        beta_start=cfg.schedule.beta_start, beta_end=cfg.schedule.beta_end, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=cfg.schedule.offset,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[cfg.prediction],
    )  # fmt: skip
    made.set_timesteps(steps)
    return made


def pipeline(kind: type, text: Text, unet: nn.Module, vae: nn.Module, steps: int, cfg: Config):
    """One of diffusers' pipelines, made of these parts and without a safety checker."""
    pipe = kind(
        vae=vae, text_encoder=text.transformer, tokenizer=text.tokenizer, unet=unet, scheduler=scheduler(cfg, steps),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def config_folder(cfg: Config, folder: Path) -> None:
    """What diffusers needs beside an original checkpoint to load it offline: configs of its parts and a vocabulary."""
    with torch.device("meta"):
        unet, vae = diffusers.UNet2DConditionModel(**unet_config(cfg)), diffusers.AutoencoderKL(**vae_config(cfg))
        text = Text(cfg.text)
    pipe = pipeline(diffusers.StableDiffusionPipeline, text, unet, vae, 1, cfg)
    pipe.save_config(folder)
    for name in ("unet", "vae", "scheduler"):
        getattr(pipe, name).save_config(folder / name)
    text.transformer.config.save_pretrained(folder / "text_encoder")
    text.tokenizer.save_pretrained(folder / "tokenizer")


def torch_text(sd: StableDiffusion) -> Callable[[Tensor], Tensor]:
    """CLIP's text tower from torch.nn.TransformerEncoderLayer: ids (b, m) -> hidden states (b, m, c_text)."""
    cfg, state = sd.config.text, sd.text.transformer.state_dict()
    layers = []
    for i in range(cfg.num_layers):
        layer = nn.TransformerEncoderLayer(
            cfg.hidden_size, cfg.num_heads, 4 * cfg.hidden_size, dropout=0.0, layer_norm_eps=cfg.eps, batch_first=True,
            activation="gelu" if cfg.act == "gelu" else lambda x: x * torch.sigmoid(1.702 * x), norm_first=True,
        )  # fmt: skip
        names = _block(state, i)
        renamed = {
            "self_attn.in_proj_weight": "attn.in_proj_weight", "self_attn.in_proj_bias": "attn.in_proj_bias",
            "self_attn.out_proj.weight": "attn.out_proj.weight", "self_attn.out_proj.bias": "attn.out_proj.bias",
            "linear1.weight": "mlp.c_fc.weight", "linear1.bias": "mlp.c_fc.bias",
            "linear2.weight": "mlp.c_proj.weight", "linear2.bias": "mlp.c_proj.bias",
            "norm1.weight": "ln_1.weight", "norm1.bias": "ln_1.bias",
            "norm2.weight": "ln_2.weight", "norm2.bias": "ln_2.bias",
        }  # fmt: skip
        layer.load_state_dict({theirs: names[clip] for theirs, clip in renamed.items()}, strict=True)
        layers.append(layer.eval().requires_grad_(False))

    def encode(ids: Tensor) -> Tensor:
        m = ids.shape[1]
        x = state["embeddings.token_embedding.weight"][ids] + state["embeddings.position_embedding.weight"][:m]
        mask = nn.Transformer.generate_square_subsequent_mask(m)
        for layer in layers:
            x = layer(x, src_mask=mask)
        scale, shift = state["final_layer_norm.weight"], state["final_layer_norm.bias"]
        return nn.functional.layer_norm(x, x.shape[-1:], scale, shift, cfg.eps)

    return encode


def open_clip_text(sd: StableDiffusion) -> Callable[[Tensor], Tensor] | None:
    """open_clip's TextTransformer; None where open_clip, or the torchvision it wants, cannot be imported."""
    try:
        from open_clip.transformer import QuickGELU, TextTransformer
    except (ImportError, RuntimeError):  # a torchvision of another torch fails with the latter
        return None
    cfg, state = sd.config.text, sd.text.transformer.state_dict()
    tower = TextTransformer(
        cfg.max_length, cfg.vocab_size, cfg.hidden_size, cfg.num_heads, cfg.num_layers,
        act_layer=torch.nn.GELU if cfg.act == "gelu" else QuickGELU,
        pool_type="none", proj_type="none",
    )  # fmt: skip
    theirs = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    for i in range(cfg.num_layers):
        theirs |= {f"transformer.resblocks.{i}.{k}": v for k, v in _block(state, i).items()}
    tower.load_state_dict(theirs, strict=True)
    return tower.eval().requires_grad_(False)


def _block(state: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Layer i of CLIP's text tower under OpenAI's names: the projections of q, k and v are one matrix."""
    p = f"encoder.layers.{i}."
    joined = {
        f"attn.in_proj_{kind}": torch.cat([state[f"{p}self_attn.{x}_proj.{kind}"] for x in "qkv"])
        for kind in ("weight", "bias")
    }
    names = {
        "attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    rest = {f"{a}.{kind}": state[f"{p}{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
    return joined | rest
