"""What both programs do before they start: open the model and its tokens, check texts and the output folder."""

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import dag
from dag.attention import Hook
from dag.cam import AttentionWithMaps
from dag.config import DAGConfig
from dag.model import MINIATURE
from dag.text import Text, clean
from dag.tokens import TokenError, fingerprint
from kernels.choice import for_run
from weights import known
from weights.files import atomic_write

from .parsing import UsageError, turned, warn


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    return "float16" if device.startswith("cuda") else "float32"


def check_device(device: str) -> None:
    """Raises UsageError for a device that torch cannot use here."""
    try:
        torch.zeros(1, device=device)
    except Exception as e:  # every backend has its own
        reason = (str(e).splitlines() or [type(e).__name__])[0][:80]
        raise UsageError(f"--device {device}: not available here ({reason}); try --device cpu") from e


def open_model(args: argparse.Namespace) -> tuple[dag.StableDiffusion, str, str]:
    """Load what --ckpt, --device and --dtype ask for; returns the model, the device and the dtype's name."""
    device = args.device or default_device()
    dtype = args.dtype or default_dtype(device)
    check_device(device)
    with warnings.catch_warnings(record=True) as raised:
        sd = dag.load(args.ckpt, device, getattr(torch, dtype), args.overlay, args.overlay_strength, args.prediction)
    for warning in raised:
        warn(str(warning.message))
    if args.ckpt is not None or args.overlay is not None:
        print(f"{args.ckpt or 'the miniature'}: {sd.origin}")
    if device == "cpu" and dtype == "float16":
        warn("float16 is many times slower than float32 on a CPU; try --dtype bfloat16 or float32")
    if args.debug:
        print(f"{sd.config.name}, ignored in the checkpoint: {', '.join(sd.ignored) or 'nothing'}")
    return sd, device, dtype


def verify(path: Path | None) -> None:
    """Say under which name a checkpoint was published. Raises CheckpointError if it was not."""
    if path is None:
        raise UsageError("--verify needs --ckpt; the miniature comes with the project")
    if not path.is_file():
        return  # loading says what is wrong
    total = path.stat().st_size
    with tqdm(total=total, desc="sha256", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        name = known.verify(path, bar.update)
    print(f"{path}: the published {name}, by its sha256")


def tokens_for(args: argparse.Namespace, sd: dag.StableDiffusion) -> list[tuple[dag.GuidelineTokens, Path | None]]:
    """(tokens, their file) per concept.

    The files given; else the miniature's own, or those beside the checkpoint that belong to it; else the plain text's,
    with a warning.
    """
    if args.tokens is None and args.ckpt is not None:
        tokens = beside(args.ckpt, sd)
    else:
        files = args.tokens or [MINIATURE / "red-circle.safetensors"]
        tokens = [(dag.GuidelineTokens.load(file), file) for file in files]
        for concept, _ in tokens:
            if message := concept.check(sd):
                warn(message)
    if not tokens:
        warn_untrained(args, sd)
        tokens = [(dag.GuidelineTokens.from_text(sd, sd.config.concept, sd.config.safety_text), None)]
    own = {"min_area": args.min_area} if hasattr(args, "min_area") else {}
    return [(replace(concept, **own), file) for concept, file in tokens]


def beside(ckpt: Path, sd: dag.StableDiffusion) -> list[tuple[dag.GuidelineTokens, Path]]:
    """The tokens in files named CKPT.*.safetensors that were trained on this model; says which, and which were not."""
    found, own = [], fingerprint(sd)
    for file in sorted(ckpt.parent.iterdir()):
        if not (file.name.startswith(f"{ckpt.name}.") and file.suffix == ".safetensors"):
            continue
        try:
            tokens = dag.GuidelineTokens.load(file)
        except TokenError as e:
            warn(f"{e}; left out")
            continue
        if tokens.fingerprint == own:
            print(f"{file}: tokens of '{tokens.concept}'")
            found.append((tokens, file))
        else:
            warn(f"{file}: tokens of '{tokens.concept}' that were trained on another model, left out")
    return found


def warn_untrained(args: argparse.Namespace, sd: dag.StableDiffusion) -> None:
    """Before and after a run without trained tokens."""
    warn(
        f"nothing is looked for well: tokens of '{sd.config.concept}' that were not optimised detect poorly; make some "
        f"by `python train_tokens.py --ckpt {args.ckpt} --concept '{sd.config.concept}'`, and they are found beside it"
    )


def attention(
    choice: str, sd: dag.StableDiffusion, tokens: list[dag.GuidelineTokens]
) -> tuple[AttentionWithMaps | None, str]:
    """`for_run` of kernels/choice.py, which says on a GPU what it decided. Raises UsageError where it cannot run."""
    try:
        fused, said = for_run(choice, sd, tokens)
        if sd.device.type == "cuda":
            print(f"attention {said}")
        return fused, said
    except ValueError as e:
        raise UsageError(f"--attention {choice}: {e}") from e


def constants(args: argparse.Namespace, cfg: DAGConfig, tokens: dag.GuidelineTokens) -> DAGConfig:
    """The model's constants of DAG with those of the command line in their place. Raises UsageError."""
    try:
        return dag.DAG(tokens, cfg=turned(cfg, args)).cfg
    except ValueError as e:
        raise UsageError(str(e)) from e


def out_of_memory(e: Exception) -> bool:
    """Whether that is what an exception says; every allocator has words of its own."""
    words = "out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED"
    return isinstance(e, MemoryError) or isinstance(e, RuntimeError) and any(word in str(e) for word in words)


def compile_unet(sd: dag.StableDiffusion) -> None:
    """Have torch.compile make one graph of the UNet, on its first call of each kind; only the batch may vary.

    The kinds are the estimates of a step with maps, those without, and safety estimates, of one image or of several;
    the first change of the batch, often a last smaller one, makes one more. A hook that reads the step or timestep of
    its `call` would have it compiled again at every step.
    """
    compiled = torch.compile(sd.unet.forward, fullgraph=True)

    def forward(x: Tensor, t: Tensor, context: Tensor, hooks: Sequence[Hook] = ()) -> Tensor:
        for each in (x, t, context):
            torch._dynamo.maybe_mark_dynamic(each, 0)
        return compiled(x, t, context, hooks)

    sd.unet.forward = forward


def check_text(sd: dag.StableDiffusion, name: str, text: str) -> None:
    """Warn of words that do not fit or that the model was never taught. name: what the text is, for the warning."""
    if rest := dropped(sd.text, text):
        warn(f"{name} longer than {sd.config.text.max_length} tokens, dropped: '{rest}'")
    if words := unknown(sd.text, text):
        warn(
            f"{name}: unknown words for the {sd.config.name} model: {', '.join(words)}; "
            f"it knows {', '.join(vocabulary(sd.text))}"
        )


def dropped(text: Text, prompt: str) -> str:
    """The end of a prompt that does not fit into max_length tokens; "" if all of it does."""
    prompt, room = clean(prompt), text.cfg.max_length - 2  # start and end take two
    spans = text.pieces(prompt)["offset_mapping"]
    return prompt[spans[room][0] :] if len(spans) > room else ""


def vocabulary(text: Text) -> list[str]:
    """The words the model was trained on; empty when it was trained on any text."""
    ids = range(text.cfg.num_words or 0)
    return [token.removesuffix("</w>") for token in text.tokenizer.convert_ids_to_tokens(list(ids))]


def unknown(text: Text, prompt: str) -> list[str]:
    """The words of a prompt that the model was never trained on; always empty for CLIP's own vocabulary."""
    if text.cfg.num_words is None:
        return []
    ids, (words, _) = text.tokenize([prompt])[0], text.places(prompt)
    return [word for word, places in words if len(places) > 1 or ids[places[0]] >= text.cfg.num_words]


def judge() -> Callable[[Image.Image], str]:
    """Writes down what the miniature's judge reads in a picture."""
    from weights.shapes.judge import Judge  # here: only the miniature has one

    from .pictures import from_pil

    judge = Judge.load()

    def read(image: Image.Image) -> str:
        (seen,) = judge.read(from_pil(image))
        return ", ".join(f"{colour} {shape}" for colour, shape in seen) or "nothing"

    return read


def writable(folder: Path) -> None:
    """Make the output folder and prove that files can be written there. Raises ValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        test = folder / ".write-test"
        test.touch()
        test.unlink()
    except OSError as e:
        raise ValueError(f"{folder}: cannot be written to ({e.strerror}); choose another folder with --out") from e


def write_text(path: Path, content: str) -> None:
    """Write UTF-8. What it has no bytes for, from file names in another encoding, becomes \\udcXX, as JSON has it."""
    with atomic_write(path) as temporary:
        temporary.write_text(content + "\n", encoding="utf-8", errors="backslashreplace")
