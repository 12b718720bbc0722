"""The paper's annotator: GroundingDINO finds boxes by a text, SAM fills each with a mask, both through transformers.

The paper leaves hair and face out of a person's mask. Neither network knows negative labels: what they cover is taken
away afterwards.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .annotations import progress
from .hub import open_model, readable
from .pictures import to_pil

from transformers import AutoModelForMaskGeneration, AutoModelForZeroShotObjectDetection  # isort: skip  after .hub

DETECTOR, SEGMENTER = "IDEA-Research/grounding-dino-base", "facebook/sam-vit-huge"
DETECTORS = ("grounding-dino", "mm-grounding-dino", "owlv2")  # in config.json; their processors take the same call
SEGMENTERS = ("sam",)  # the later ones have other processors
SCORE = 0.3  # of a box to be kept, as in MACE (Lu et al. 2024), which erases concepts with the same two networks
AT_ONCE = 8  # boxes to segment; each needs 32 MB


class GroundedSAM:
    """Loads both networks and tries them, so that whatever is wrong is said before pictures are drawn.

    labels, not_labels: what a mask covers and what it leaves out, such as ["a person"] and ["hair", "face"].
    detector_model, segmenter_model: folders with config, processor and safetensors weights, or names on the hub.
    Their kinds are DETECTORS and SEGMENTERS; OWLv2's processor needs scipy. Raises ValueError.
    """

    def __init__(
        self,
        labels: Sequence[str],
        not_labels: Sequence[str] = (),
        detector_model: str | Path = DETECTOR,
        segmenter_model: str | Path = SEGMENTER,
        device: str | torch.device = "cpu",
    ):
        if not labels:
            raise ValueError("no label to look for; expected at least one, such as 'a person'")
        self.labels, self.not_labels, self.device = [*map(cleaned, labels)], [*map(cleaned, not_labels)], device
        detects, segments = AutoModelForZeroShotObjectDetection, AutoModelForMaskGeneration
        self.detector, self.detector_processor = open_model(detector_model, DETECTORS, detects, device)
        self.segmenter, self.segmenter_processor = open_model(segmenter_model, SEGMENTERS, segments, device)
        grey = Image.new("RGB", (64, 64), (128, 128, 128))
        for label in [*self.labels, *self.not_labels]:
            with readable(f"{detector_model}: looking for '{label[:40]}' fails", "a short label, or another detector"):
                self.boxes(grey, label)
        with readable(f"{segmenter_model}: making a mask fails", "another segmenter"):
            self.cover(grey, torch.tensor([[8.0, 8.0, 56.0, 56.0]]), torch.empty(0, 4))

    def masks(self, pictures: Tensor) -> Tensor:
        """(N, 3, height, width) in [-1, 1] -> (N, height, width) bool, on the CPU.

        True inside what labels name, but not inside what not_labels name. Empty where none of the labels is found.
        """
        one_by_one = progress(pictures.split(1), "annotation", len(pictures))
        return torch.stack([self.mask(*to_pil(picture)) for picture in one_by_one])  # (N, height, width)

    def mask(self, picture: Image.Image) -> Tensor:
        """A picture -> (height, width) bool."""
        inside = self.boxes_of(picture, self.labels)
        if len(inside) == 0:
            return torch.zeros(picture.height, picture.width, dtype=torch.bool)
        return self.cover(picture, inside, self.boxes_of(picture, self.not_labels))

    def boxes_of(self, picture: Image.Image, labels: list[str]) -> Tensor:
        """The boxes of some labels, (n, 4). Each is looked for by itself: asked together, two labels can merge."""
        return torch.cat([torch.empty(0, 4), *(self.boxes(picture, label) for label in labels)])  # (n, 4)

    @torch.no_grad()
    def boxes(self, picture: Image.Image, label: str) -> Tensor:
        """The boxes found of a label, (n, 4): left, top, right, bottom in pixels of the picture. n may be 0."""
        process = self.detector_processor
        inputs = process(images=picture, text=[[label]], return_tensors="pt").to(self.device)
        outputs, size = self.detector(**inputs), (picture.height, picture.width)
        (found,) = process.post_process_grounded_object_detection(outputs, threshold=SCORE, target_sizes=[size])
        return found["boxes"].float().cpu()

    @torch.no_grad()
    def cover(self, picture: Image.Image, inside: Tensor, outside: Tensor) -> Tensor:
        """What the objects in some boxes (n, 4) cover without those in others (m, 4) -> (height, width) bool."""
        process, boxes = self.segmenter_processor, torch.cat([inside, outside]).tolist()
        inputs = process(images=picture, input_boxes=[boxes], return_tensors="pt")
        seen = self.segmenter.get_image_embeddings(inputs["pixel_values"].to(self.device))  # once for all boxes
        boxes = inputs["input_boxes"].float().to(self.device)  # (1, n + m, 4), in pixels of the segmenter's input
        covered = torch.zeros(2, picture.height, picture.width, dtype=torch.bool)
        for k, group in enumerate(boxes.split([len(inside), len(outside)], 1)):
            for i in range(0, group.shape[1], AT_ONCE):
                some = group[:, i : i + AT_ONCE]
                low = self.segmenter(image_embeddings=seen, input_boxes=some, multimask_output=False).pred_masks.cpu()
                (each,) = process.post_process_masks(low, inputs["original_sizes"], inputs["reshaped_input_sizes"])
                covered[k] |= each.any(0)[0]  # (boxes, 1, height, width) -> (height, width)
        return covered[0] & ~covered[1]


def cleaned(label: str) -> str:
    """A label without its period; the processor adds one, and makes small letters of it. Raises ValueError."""
    kept = label.strip().rstrip(".").strip()
    if not kept or "." in kept:
        raise ValueError(f"label '{label}': expected one thing to look for, without a period in it, such as 'a person'")
    return kept
