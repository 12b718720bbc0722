"""The page that sample.py writes with --page: one HTML file, with nothing to load, to move through the denoising.

`page.html` is its source, a template in plain HTML, CSS and JavaScript; the data stand in it as JSON. A fork that fills
the same JSON gets the same page, and `maps` may hold any more maps, each of which gets a button:

    version     1
    model       {name, layers: names of those whose attention is shown}
    t           the timestep of every step
    s_g, memory, warmup     the guidance scale, DAG's memory, its steps without guidance
    concepts    [{name, safety_text, background, rows, constants: dag.config.Scaling}]; background: that many first rows
    lacks       sentences: what the run had that the page does not show
    pictures    [{prompt, seed, words, runs}], words: [{text, kind: "start", "word", "rest" or "dropped"}]
    runs        one per method: {method, entry}, and but for a picture that failed what follows
      entry       report.json's entry of the picture
      frames      base64 WebP per step: x0; null where x0 is bit for bit the first run's
      decoded     the steps whose frames are decoded, not approximated
      guided      0 or 1 per step;  unet_rows: their number per step
      found       per step, per concept: area of its objects as a share of the frame; null without maps
      maps        {A, A_acted: (steps, concepts, H, W), S: (steps, H, W)}, by name; A_acted only where it is not A
      words, rows (steps, words, h, w); per concept (steps, rows, h, w): shares of a place's attention

A map is {shape, max, data}: base64 of deflated bytes u, with value = max (u / 255)^2, which is fine where tau is.
"""

import base64
import io
import json
import zlib
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import dag
from dag.cam import layers_of
from dag.config import DAGConfig
from dag.recording import Recording, decode_some, film, reading_of
from weights.files import atomic_write

from .pictures import to_pil
from .records import Records
from .report import Drawing
from .setup import dropped

TEMPLATE = Path(__file__).with_name("page.html")
PICTURES = 16  # of one method that a page holds at most; one of 512 x 512 and 50 steps takes about 1 MB
SIDE = 256  # pixels: what is not decoded is not stored larger


def packed(maps: Tensor) -> dict:
    """Maps >= 0 of any shape -> their JSON, in 8 bits each."""
    top = maps.max().item() or 1.0
    u8 = ((maps / top).sqrt() * 255).round().byte()
    data = base64.b64encode(zlib.compress(u8.numpy().tobytes(), 9)).decode()
    return {"shape": list(maps.shape), "max": top, "data": data}


def webp(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80, method=2)
    return base64.b64encode(buffer.getvalue()).decode()


class Page:
    """Collects what was recorded of a run, small as it will stand on the page, and writes it."""

    def __init__(self, sd: dag.StableDiffusion, tokens: list[dag.GuidelineTokens], cfg: DAGConfig, s_g: float):
        self.sd, self.tokens, self.cfg, self.s_g = sd, tokens, cfg, s_g
        self.t: list[int] = []
        self.pictures: dict[int, dict] = {}  # by number of the picture
        self.first: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}  # of this batch: x0 and what is decoded of it

    def add(self, m: int, numbers: list[int], drawings: list[Drawing], recording: Recording) -> None:
        """Take up the pictures of these numbers, the first of a batch by method number m, and what was recorded."""
        if m == 0:
            self.first = {}
        steps = recording.steps
        self.t = max(self.t, [step.t for step in steps], key=len)  # a batch that failed ends early
        words, *rows = recording.read()  # (b, steps, m, h, w), (b, steps, g, h, w) each
        x0 = torch.stack([step.x0 for step in steps], 1).float().cpu()  # (b, steps, 4, H, W)
        unet_rows = torch.stack([step.unet_rows for step in steps], 1)  # (b, steps)
        for j, (k, drawing) in enumerate(zip(numbers, drawings, strict=False)):
            groups, chart = self.groups(drawing.prompt)
            run = {"method": drawing.method}
            if not drawing.failed:
                frames, decoded = self.frames(k, m, x0[j])
                run |= {
                    "frames": frames,
                    "decoded": decoded,
                    "guided": [int(g) for g in drawing.guided],
                    "unet_rows": unet_rows[j].tolist(),
                    "found": found(drawing),
                    "maps": maps(drawing),
                    "words": packed(torch.einsum("wm,smyx->swyx", groups, words[j])),
                    "rows": [packed(one[j]) for one in rows],
                }
            picture = {"prompt": drawing.prompt, "seed": drawing.seed, "words": chart, "runs": {}}
            self.pictures.setdefault(k, picture)["runs"][m] = run  # whole or not at all, whatever stops the run

    def groups(self, prompt: str) -> tuple[Tensor, list[dict]]:
        """Which of the m tokens make each word, (words, m) of 0 and 1, and the words: start, the prompt's, the rest."""
        words, end = self.sd.text.places(prompt)
        m = self.sd.config.text.max_length
        places = [[0], *(places for _, places in words), list(range(end, m))]
        groups = torch.zeros(len(places), m)
        for row, own in zip(groups, places, strict=True):
            row[own] = 1
        chart = [{"text": "start", "kind": "start"}, *({"text": text, "kind": "word"} for text, _ in words)]
        chart.append({"text": "end and padding", "kind": "rest"})
        if rest := dropped(self.sd.text, prompt):
            chart.append({"text": rest, "kind": "dropped"})
        return groups, chart

    def frames(self, k: int, m: int, x0: Tensor) -> tuple[list[str | None], list[int]]:
        """WebP of every step of picture k by method m, None where the first method's latent is the same; and the steps
        that are decoded."""
        first = self.first.get(k)
        same = [first is not None and torch.equal(x0[i], first[0][i]) for i in range(len(x0))]
        if all(same):
            return [None] * len(x0), []
        x0 = x0.nan_to_num().clamp(-100, 100)  # one step that is not finite costs no other
        known = {i: picture for i, picture in first[1].items() if same[i]} if first else {}
        decoded = decode_some(self.sd, x0, known)
        if m == 0:
            self.first[k] = x0, decoded
        wanted, frames = [i for i in range(len(x0)) if not same[i]], [None] * len(x0)
        for i, picture in zip(wanted, film(x0, decoded, wanted), strict=True):
            image = to_pil(picture[None])[0]
            if i not in decoded:
                image.thumbnail((SIDE, SIDE))
            frames[i] = webp(image)
        return frames, sorted(decoded)

    def lacks(self, here: int, records: Records) -> list[str]:
        """Sentences on what the run had and a page of so many pictures does not show."""
        total, missing = len(records.jobs), len(records.missing())
        said = [] if self.tokens else ["Nothing was looked for, so there are no maps."]
        if missing:
            said.append(f"The run was stopped: {total - missing} of {total} pictures were finished.")
        if here < total - missing:
            first = f"a page holds the first {PICTURES} that one run draws"
            why = (
                first
                if here >= PICTURES
                else "the others are another run's, or this one stopped before they were recorded"
            )
            said.append(f"{here} of {total - missing} pictures are on this page: {why}.")
        return said

    def write(self, path: Path, records: Records) -> None:
        """Write the page, with the report's entries."""
        pictures = []
        for k, picture in sorted(self.pictures.items()):
            runs = [run | {"entry": e} for m, run in picture["runs"].items() if (e := records.entries.get((k, m)))]
            pictures += [picture | {"runs": runs}] if runs else []
        sd = self.sd
        layers = layers_of(sd.unet, reading_of(sd, self.tokens))
        data = {
            "version": 1,
            "model": {"name": sd.config.name, "layers": [layer.name for layer in layers]},
            "t": self.t,
            "s_g": self.s_g, "memory": self.cfg.memory, "warmup": self.cfg.warmup,
            "concepts": [
                {
                    "name": c.concept, "safety_text": c.safety_text, "background": c.split[0], "rows": sum(c.split),
                    "constants": asdict(c.adapt(self.cfg.scaling)),
                }
                for c in self.tokens
            ],
            "lacks": self.lacks(len(pictures), records), "pictures": pictures,
        }  # fmt: skip
        write(path, data)


def found(drawing: Drawing) -> list[list[float]] | None:
    """Per step and concept, the area of the objects found as a share of the frame; 0 in the warm-up."""
    if drawing.A is None:
        return None
    late = drawing.sizes.tolist() if len(drawing.late) else []
    return [[0.0] * drawing.A.shape[1]] * (len(drawing.A) - len(late)) + late


def maps(drawing: Drawing) -> dict[str, dict]:
    """The maps of a drawing by name, packed."""
    named = {"A": drawing.A, "A_acted": drawing.A_acted, "S": drawing.S}
    if drawing.A is not None and drawing.A_acted is not None and torch.equal(drawing.A, drawing.A_acted):
        del named["A_acted"]
    return {name: packed(one.float()) for name, one in named.items() if one is not None}


def write(path: Path, data: dict) -> None:
    """Put the data into the template. Prompts are data: no `<` of theirs can end the script element they stand in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII, whatever the prompts hold
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("/*DATA*/")
    with atomic_write(path) as temporary:
        temporary.write_text(head + text + tail, encoding="utf-8")
