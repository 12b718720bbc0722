"""Pictures for a person to look at: maps over pictures, strips of maps, contact sheets, PNG files."""

from bisect import bisect_right
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from weights.files import atomic_write

MARGIN, LINE = 8, 18  # pixels: around a picture of a sheet, height of a line of text
INK, PAPER = (30, 30, 30), (255, 255, 255)


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """(b, 3, height, width) in [-1, 1] -> b pictures."""
    u8 = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (b, height, width, 3)
    return [Image.fromarray(p) for p in u8]


def from_pil(picture: Image.Image) -> Tensor:
    """A picture -> (1, 3, height, width) float32 in [-1, 1]."""
    u8 = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
    return u8.permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, height, width)


def opened(path: Path) -> Image.Image:
    """A picture file in RGB. Raises ValueError for one that cannot be read."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError as e:
        raise ValueError(f"{path}: no such file; expected a picture, PNG or JPEG") from e
    except (OSError, SyntaxError) as e:  # Pillow raises both
        raise ValueError(f"{path}: not a readable picture ({type(e).__name__}); expected a complete PNG or JPEG") from e


def overlay(picture: Image.Image, A: Tensor) -> Image.Image:
    """A map A (H, W) in [0, 1] over a greyed picture: orange where it is high, A = 0.5 drawn as a line."""
    small = Image.fromarray((A.float().cpu().numpy() * 255).round().astype(np.uint8))
    a = np.asarray(small.resize(picture.size, Image.Resampling.BILINEAR), np.float32)[..., None] / 255
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32) * 0.6 + 60
    mixed = grey * (1 - 0.8 * a) + 0.8 * a * np.float32((255, 120, 0))
    inside = a[..., 0] >= 0.5
    edge = inside & ~_eroded(inside)
    mixed[edge] = (255, 255, 255)
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _eroded(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:] & mask


def strip(maps: Tensor, side: int = 64) -> Image.Image:
    """Maps of all steps (steps, H, W) in [0, 1] -> one picture, ten in a row, from the first step to the last."""
    tiles = [Image.fromarray((a.cpu().numpy() * 255).round().astype(np.uint8)).resize((side, side)) for a in maps]
    out = Image.new("L", (10 * side, -(-len(tiles) // 10) * side))
    for k, tile in enumerate(tiles):
        out.paste(tile, (k % 10 * side, k // 10 * side))
    return out


def contact_sheet(
    rows: list[tuple[str, list[Image.Image]]],
    heads: list[str],
    side: int = 192,
    notes: list[list[str]] | None = None,
) -> Image.Image:
    """Rows of (caption, pictures) under column heads -> one picture; every cell is `side` pixels wide or less.

    notes: one line under each picture, row by row.
    """
    font = ImageFont.load_default(13)
    columns = max(len(pictures) for _, pictures in rows)
    below = LINE if notes else 0
    tall = [max(p.height * side // p.width for p in pictures) + below for _, pictures in rows]
    width = columns * (side + MARGIN) + MARGIN
    top = LINE if any(heads) else 0
    sheet = Image.new("RGB", (width, top + MARGIN + sum(h + LINE + MARGIN for h in tall)), PAPER)
    draw, y = ImageDraw.Draw(sheet), top + MARGIN
    for k, head in enumerate(heads):
        draw.text((MARGIN + k * (side + MARGIN), 5), head, INK, font)
    for i, ((caption, pictures), h) in enumerate(zip(rows, tall, strict=True)):
        for k, picture in enumerate(pictures):
            x = MARGIN + k * (side + MARGIN)
            sheet.paste(picture.resize((side, picture.height * side // picture.width)), (x, y))
            if notes:
                draw.text((x, y + h - below + 1), fitted(notes[i][k], font, side), INK, font)
        draw.text((MARGIN, y + h + 1), fitted(caption, font, width - 2 * MARGIN), INK, font)
        y += h + LINE + MARGIN
    return sheet


def fitted(text: str, font, width: int) -> str:
    """Text cut with an ellipsis to at most `width` pixels."""
    if font.getlength(text) <= width:
        return text
    longer = bisect_right(range(len(text) + 1), width, key=lambda n: font.getlength(text[:n] + "..."))
    return text[: max(0, longer - 1)] + "..."


def save_png(picture: Image.Image, path: Path, text: dict[str, str] | None = None) -> None:
    """Write a PNG with text chunks."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    with atomic_write(path) as temporary:
        picture.save(temporary, "PNG", pnginfo=info)


def is_whole(path: Path) -> bool:
    """Whether a PNG file is there to its end."""
    try:
        with open(path, "rb") as file:
            file.seek(-8, 2)
            return file.read(4) == b"IEND"
    except OSError:  # missing, or shorter
        return False
