"""Every constant of the model, once: widths, epsilons, scale factors, schedule, and what guidance uses by default.

`SD14`, SD 2.1's two and `SHAPES`, the miniature that ships with the project, are instances of one class.
Source: CompVis configs/stable-diffusion/v1-inference.yaml and the module defaults it relies on; Stability-AI
configs/stable-diffusion/v2-inference.yaml and v2-inference-v.yaml.
"""

from dataclasses import dataclass, field, replace

STEPS = 50  # of a run by default; every second of its noise levels is what tokens are trained on
SIDE = 64  # pixels: the sides of a picture are multiples of it, so that the UNet can halve the latent three times
ATTENTIONS = ("auto", "plain", "fused")  # kernels/choice.py
ANNOTATORS = ("maps", "grounded-sam", "judge")  # dag/cli/annotators.py
NORMALISATIONS = ("fitted", "joint", "map")  # dag/cam.py
METHODS = ("none", "negative", "sld-weak", "sld-medium", "sld-strong", "sld-max", "sega", "dag", "dag-sld")


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser. Level i is on the latent grid divided by 2**i, with model_channels * channel_mult[i] channels."""

    model_channels: int
    num_groups: int  # of every GroupNorm
    num_heads: int | None  # of every attention layer, whatever its width; None: as many as head_channels says
    context_dim: int  # width of the text encoder's hidden states
    in_channels: int = 4  # of the latent, in and out
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2  # per level on the way down; one more on the way up
    attention_factors: tuple[int, ...] = (1, 2, 4)  # levels with transformers; the middle always has one
    head_channels: int | None = None  # of every head, where num_heads is None
    linear: bool = False  # whether transformers begin and end in a Linear instead of a 1 x 1 convolution
    eps_res: float = 1e-5  # GroupNorm in residual blocks and before the last convolution
    eps_transformer: float = 1e-6  # GroupNorm at the head of a SpatialTransformer
    eps_layer: float = 1e-5  # LayerNorm in transformer blocks

    def heads(self, channels: int) -> int:
        """Of an attention layer of so many channels."""
        return channels // self.head_channels if self.num_heads is None else self.num_heads


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder: pictures of 3 channels in [-1, 1] <-> latents of z_channels on a grid 8 times smaller."""

    ch: int
    num_groups: int
    num_res_blocks: int  # per level in the encoder; one more in the decoder
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    z_channels: int = 4
    eps: float = 1e-6  # every GroupNorm; torch's default of 1e-5 makes pictures drift
    scale_factor: float = 0.18215  # latents times this have about unit variance

    @property
    def factor(self) -> int:
        """Pixels of the picture per pixel of the latent, along one side (8)."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text tower, read after its final layer norm."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_length: int  # tokens, start and end included
    vocabulary: str  # folder under weights/ with vocab.json and merges.txt
    act: str = "quick_gelu"  # of the feed-forward layers
    pad: int | None = None  # token that fills a prompt up to max_length; None: the end token
    num_words: int | None = None  # the first ids are this many whole words and nothing else was trained; None: any text
    eps: float = 1e-5


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule: betas are the squares of a straight line between the square roots ("scaled linear")."""

    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    offset: int = 1  # the original adds 1 to every sampling timestep: 50 steps are 981, 961, ..., 1


@dataclass(frozen=True)
class Scaling:
    """Constants of the scalers; the defaults are the paper's, but for those marked (ours)."""

    unsafe: float = 0.5  # A from here on is an object (Algorithm 1)
    edit: float = 0.01  # A from here on may be edited (tau in Eq. 5)
    full: float = 0.8  # ignore a map when at least this share of its pixels has A >= edit (Algorithm 1)
    area_gain: float | None = 5.0  # Algorithm 1's constant; None: without Algorithm 1 (ablation)
    magnitude: float = 5.0  # upper end of T (Eq. 5)
    min_area: float = 1 / 256  # smaller objects, as a share of the frame, are dropped (ours): 16 pixels of 64 x 64
    s_max: float | None = None  # upper bound on S (ours); None: no bound


@dataclass(frozen=True)
class DAGConfig:
    """Detect-and-Guide; the defaults are the paper's, but for `Scaling.min_area` (ours)."""

    warmup: int = 5  # steps, counted from 0, on which nothing is guided
    top: float = 0.1  # base "sega": share of the latent's values, per channel, that are edited
    threshold: float = 0.025  # base "sld": lambda of its mask
    memory: float = 0.0  # share of a step's A that the next step keeps where its own is lower (ours); 0: forget at once
    scaling: Scaling = field(default_factory=Scaling)


@dataclass(frozen=True)
class Config:
    """A whole model and how it is sampled by default."""

    name: str
    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    size: int  # pixels: default height and width of a picture
    scale: float  # default classifier-free guidance scale s_g
    prompts: tuple[str, ...]  # drawn when none is given
    cam_factors: tuple[int, ...]  # detection reads the cross-attention layers on the latent grid divided by these
    concept: str  # text of the unsafe concept when no token file is given
    safety_text: str  # what guidance then pushes away from
    prediction: str = "eps"  # what the UNet tells: the noise, or v = sqrt(abar_t) noise - sqrt(1 - abar_t) x0
    dag: DAGConfig = field(default_factory=DAGConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


SD14 = Config(
    name="SD 1.4",
    unet=UNetConfig(model_channels=320, num_groups=32, num_heads=8, context_dim=768),
    vae=VAEConfig(ch=128, num_groups=32, num_res_blocks=2),
    text=TextConfig(vocab_size=49408, hidden_size=768, num_layers=12, num_heads=12, max_length=77, vocabulary="clip"),
    size=512,
    scale=7.5,
    prompts=("a photograph of an astronaut riding a horse",),
    cam_factors=(2, 4),  # 32 x 32 and 16 x 16 of 64 x 64: finer is noisy, coarser is blunt
    concept="nude person",
    safety_text="nude, nudity, naked, sexual",
)

SD21 = replace(  # 2.0's files too
    SD14,
    name="SD 2.1 base",
    unet=UNetConfig(model_channels=320, num_groups=32, num_heads=None, context_dim=1024, head_channels=64, linear=True),
    text=TextConfig(  # OpenCLIP's ViT-H, read before its 24th layer
        vocab_size=49408,
        hidden_size=1024,
        num_layers=23,
        num_heads=16,
        max_length=77,
        vocabulary="clip",
        act="gelu",
        pad=0,
    ),
)
SD21_V = replace(SD21, name="SD 2.1", size=768, prediction="v")

SHAPES = Config(
    name="shapes",
    unet=UNetConfig(model_channels=32, num_groups=16, num_heads=4, context_dim=128),
    vae=VAEConfig(ch=16, num_groups=8, num_res_blocks=1),
    text=TextConfig(
        vocab_size=131, hidden_size=128, num_layers=2, num_heads=4, max_length=24, vocabulary="shapes", num_words=25
    ),
    size=128,
    scale=5.0,
    prompts=(
        "a red circle and a green triangle on night",
        "a tomato on sand",
        "a red star and a blue circle on white",
        "a yellow star on night",
    ),
    cam_factors=(1, 2),  # 16 x 16 and 8 x 8 of 16 x 16
    concept="a red circle",
    safety_text="a red circle",
    # Objects are 10 to 20 % of a small frame: guided harder, within a bound, and not forgotten (docs/constants.md).
    dag=DAGConfig(top=0.3, memory=0.97, scaling=Scaling(area_gain=40.0, s_max=3.0, min_area=0.04)),
)
