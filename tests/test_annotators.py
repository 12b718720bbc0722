"""Who annotates pictures that nobody has annotated by hand, and the prompts they are drawn from."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

import dag.text
from dag.cli.grounded_sam import AT_ONCE, GroundedSAM
from dag.cli.prompts import concept_and_look_alikes
from dag.config import SD14

PROMPTS = Path(dag.text.WEIGHTS, "prompts", "nude-person.txt")
HEIGHT, WIDTH = 128, 64  # of the pictures; the segmenter sees them at half the size
WORDS = ("a", "person", "statue", "hair", "face")


def bert_words() -> dict[str, int]:
    """A small vocabulary with the special tokens where BERT's has them; GroundingDINO knows them by their numbers."""
    words = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    words |= dict(enumerate(WORDS, 200))
    return {words.get(i, f"[unused{i}]"): i for i in range(1030)}


def save_detector(folder: Path, kind: str = "GroundingDino") -> Path:
    """A detector with random weights, saved as on the hub."""
    backbone = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    text = transformers.BertConfig(
        vocab_size=1030, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    cfg = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone, text_config=text, d_model=32, num_queries=20, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    getattr(transformers, f"{kind}ForObjectDetection")(cfg).save_pretrained(folder)
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 192})
    transformers.GroundingDinoProcessor(images, transformers.BertTokenizer(bert_words())).save_pretrained(folder)
    return folder


def save_owl(folder: Path) -> Path:
    """A detector of the other family with random weights."""
    words = {"<pad>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
    words |= {piece: i for i, piece in enumerate((c + end for c in "aehinoprst" for end in ("", "</w>")), 3)}
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    cfg = transformers.Owlv2Config(
        text_config=size | {"vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config=size | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    transformers.Owlv2ForObjectDetection(cfg).save_pretrained(folder)
    images = transformers.Owlv2ImageProcessor(size={"height": 32, "width": 32})
    tokenizer = transformers.CLIPTokenizer(words, [], model_max_length=16)
    transformers.Owlv2Processor(images, tokenizer).save_pretrained(folder)
    return folder


def save_segmenter(folder: Path) -> Path:
    """A segmenter with random weights."""
    cfg = transformers.SamConfig(
        vision_config=transformers.SamVisionConfig(
            hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=64,
            patch_size=16, window_size=2, global_attn_indexes=[0], num_pos_feats=8, mlp_dim=16, initializer_range=0.1,
        ),
        prompt_encoder_config=transformers.SamPromptEncoderConfig(hidden_size=16, image_size=64, mask_input_channels=4),
        mask_decoder_config=transformers.SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )  # fmt: skip
    transformers.SamModel(cfg).save_pretrained(folder)
    images = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    transformers.SamProcessor(images).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    return save_detector(tmp_path_factory.mktemp("detector")), save_segmenter(tmp_path_factory.mktemp("segmenter"))


@pytest.mark.parametrize("kind", ["GroundingDino", "MMGroundingDino", "Owlv2"])
def test_random_networks_make_masks_that_negative_labels_reduce(folders, tmp_path, kind, monkeypatch):
    """The whole way from folders to masks; what they show is as random as the networks."""
    if kind == "Owlv2":
        pytest.importorskip("scipy")  # its processor needs it
    monkeypatch.setattr("dag.cli.grounded_sam.SCORE", 0.0)  # keeps all boxes
    detector = save_owl(tmp_path) if kind == "Owlv2" else save_detector(tmp_path, kind)
    pictures = torch.rand(3, 3, HEIGHT, WIDTH) * 2 - 1
    plain = GroundedSAM(["A person."], [], detector, folders[1]).masks(pictures)
    less = GroundedSAM(["A person."], ["hair", "face"], detector, folders[1]).masks(pictures)
    assert plain.shape == (3, HEIGHT, WIDTH) and plain.dtype == torch.bool
    assert plain.flatten(1).any(1).all() and not (less & ~plain).any() and (plain & ~less).any()


class Detector:
    """Knows where things are: label -> (score, left, top, right, bottom), in pixels. A black picture shows nothing."""

    def __init__(self, sam: GroundedSAM, known: dict[str, list[tuple]]):
        self.tokenizer, self.known, self.asked = sam.detector_processor.tokenizer, known, []

    def __call__(self, pixel_values: Tensor, input_ids: Tensor, **_):
        self.asked.append(self.tokenizer.decode(input_ids[0], skip_special_tokens=True).replace(" .", "."))
        known = self.known.get(self.asked[-1], []) if pixel_values.mean() > -1 else []
        logits, boxes = torch.full((1, 20, 256), -10.0), torch.zeros(1, 20, 4)
        for i, (score, left, top, right, bottom) in enumerate(known):
            logits[0, i, 1] = torch.tensor(score).logit()
            middle = (left + right) / 2 / WIDTH, (top + bottom) / 2 / HEIGHT
            boxes[0, i] = torch.tensor([*middle, (right - left) / WIDTH, (bottom - top) / HEIGHT])
        return transformers.models.grounding_dino.modeling_grounding_dino.GroundingDinoObjectDetectionOutput(
            logits=logits, pred_boxes=boxes, input_ids=input_ids
        )


class Segmenter:
    """Fills every box, which it is given in pixels of its own input."""

    def __init__(self):
        self.seen, self.sizes = 0, []

    def get_image_embeddings(self, pixel_values: Tensor) -> Tensor:
        self.seen += 1
        return pixel_values

    def __call__(self, image_embeddings: Tensor, input_boxes: Tensor, multimask_output: bool):
        assert not multimask_output
        self.sizes.append(input_boxes.shape[1])
        side = image_embeddings.shape[-1]
        filled = [2.0 * filled_box(*box, side, side) - 1 for box in input_boxes[0].round().long().tolist()]
        return transformers.models.sam.modeling_sam.SamImageSegmentationOutput(
            iou_scores=torch.ones(1, len(filled), 1), pred_masks=torch.stack(filled)[None, :, None]
        )


def filled_box(left: int, top: int, right: int, bottom: int, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.fixture
def known(folders):
    """Makes an annotator that finds what it is told, with the real processors."""

    def make(labels: list[str], not_labels: list[str], things: dict[str, list[tuple]]) -> GroundedSAM:
        sam = GroundedSAM(labels, not_labels, *folders)
        sam.detector, sam.segmenter = Detector(sam, things), Segmenter()
        return sam

    return make


PERSON, SECOND, THIRD, HAIR = (8, 16, 40, 100), (36, 60, 60, 120), (0, 0, 10, 8), (4, 10, 30, 30)


def test_a_mask_covers_all_labels_and_leaves_out_the_others(known):
    things = {
        "a person.": [(0.9, *PERSON), (0.35, *SECOND)],
        "a statue.": [(0.5, *THIRD)],
        "hair.": [(0.6, *HAIR)],
        "face.": [],
    }
    sam = known(["A person.", "a statue"], ["Hair", "face"], things)
    (mask,) = sam.masks(torch.zeros(1, 3, HEIGHT, WIDTH))
    covered = filled_box(*PERSON) | filled_box(*SECOND) | filled_box(*THIRD)
    assert torch.equal(mask, covered & ~filled_box(*HAIR))
    assert sam.detector.asked == ["a person.", "a statue.", "hair.", "face."], "each label in a call of its own"
    assert sam.segmenter.seen == 1, "the segmenter looks once at a picture"


def test_boxes_of_low_score_are_dropped(known):
    sam = known(["a person"], [], {"a person.": [(0.9, *PERSON), (0.29, *SECOND)]})
    assert torch.equal(sam.masks(torch.zeros(1, 3, HEIGHT, WIDTH))[0], filled_box(*PERSON))


def test_nothing_found_is_an_empty_mask_and_costs_no_segmenter(known):
    sam = known(["a person"], ["hair"], {"a person.": [(0.9, *PERSON)], "hair.": [(0.9, *HAIR)]})
    pictures = torch.stack([torch.full((3, HEIGHT, WIDTH), value) for value in (-1.0, 0.0)])  # black, grey
    empty, full = sam.masks(pictures)
    assert not empty.any() and torch.equal(full, filled_box(*PERSON) & ~filled_box(*HAIR))
    assert sam.segmenter.seen == 1
    sam = known(["a statue"], ["hair"], {"hair.": [(0.9, *HAIR)]})
    assert not sam.masks(pictures).any()


def test_many_boxes_are_segmented_a_few_at_a_time(known):
    boxes = [(2 * i, 4 * i, 2 * i + 6, 4 * i + 10) for i in range(20)]
    sam = known(["a person"], [], {"a person.": [(0.9, *box) for box in boxes]})
    (mask,) = sam.masks(torch.zeros(1, 3, HEIGHT, WIDTH))
    assert torch.equal(mask, torch.stack([filled_box(*box) for box in boxes]).any(0))
    assert max(sam.segmenter.sizes) <= AT_ONCE and sum(sam.segmenter.sizes) == 20


def refused(*args) -> str:
    """The line that the annotator is refused with."""
    with pytest.raises(ValueError) as raised:
        GroundedSAM(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("label", ["", " . ", "a person. hair"])
def test_labels_name_one_thing_each(label):
    assert "without a period" in refused([label])
    assert "without a period" in refused(["a person"], [label])


def test_no_label():
    assert "no label" in refused([])


def test_models_that_are_not_there(folders, tmp_path):
    detector, segmenter = folders
    assert "no such folder" in refused(["a person"], [], tmp_path / "nowhere", segmenter)
    assert "no such folder" in refused(["a person"], [], detector, tmp_path / "nowhere")
    line = refused(["a person"], [], "nobody/nothing", segmenter)  # the tests have no network
    assert "hf download" in line and "nobody/nothing" in line
    assert "config cannot be read" in refused(["a person"], [], tmp_path, segmenter)


def test_models_of_the_wrong_kind(folders):
    detector, segmenter = folders
    line = refused(["a person"], [], segmenter, detector)
    assert "of the kind sam;" in line and "grounding-dino" in line
    assert "of the kind grounding-dino;" in refused(["a person"], [], detector, detector)


@pytest.fixture
def damaged(folders, tmp_path) -> Path:
    """A copy of the detector to break."""
    return shutil.copytree(folders[0], tmp_path / "damaged")


def test_a_folder_without_its_processor(folders, damaged):
    for path in damaged.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    assert "processor cannot be read" in refused(["a person"], [], damaged, folders[1])


def test_weights_that_are_missing_or_cut(folders, damaged):
    file = damaged / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    lost = weights.pop("model.level_embed")
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    assert "weights are missing, 1, such as model.level_embed" in refused(["a person"], [], damaged, folders[1])
    safetensors.torch.save_file(weights | {"model.level_embed": lost[:1].clone()}, file, {"format": "pt"})
    assert "weights cannot be read" in refused(["a person"], [], damaged, folders[1])
    file.write_bytes(file.read_bytes()[:1000])
    assert "weights cannot be read" in refused(["a person"], [], damaged, folders[1])


class Executed:
    def __init__(self, flag: Path):
        self.flag = flag

    def __reduce__(self):
        return Path.touch, (self.flag,)


def test_nothing_in_a_folder_is_executed(folders, damaged, tmp_path):
    """Neither code beside the model nor pickled weights."""
    flag = tmp_path / "executed"
    (damaged / "own.py").write_text(f"open({str(flag)!r}, 'w')\n")
    names = {"AutoConfig": "own.C", "AutoProcessor": "own.P", "AutoModelForZeroShotObjectDetection": "own.M"}
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        file = damaged / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": names}))
    GroundedSAM(["a person"], [], damaged, folders[1])
    weights, pickled = damaged / "model.safetensors", damaged / "pytorch_model.bin"
    torch.save(safetensors.torch.load_file(weights), pickled)
    weights.unlink()
    assert "weights cannot be read" in refused(["a person"], [], damaged, folders[1]), "not even harmless ones"
    pickled.write_bytes(pickle.dumps(Executed(flag)))
    assert "weights cannot be read" in refused(["a person"], [], damaged, folders[1])
    assert not flag.exists()


def test_labels_are_tried_before_pictures_are_drawn(folders):
    """Whatever the networks cannot do is said when they are loaded."""
    assert "looking for" in refused(["a person " * 400], [], *folders)


def test_shipped_prompts():
    """Of the nude person: 24 and 24, of seven kinds, all short enough for the text encoder, and of adults only."""
    concept, look_alikes = concept_and_look_alikes(PROMPTS)
    others, kinds = zip(*look_alikes, strict=True)
    assert len(concept) == len(others) == 24 and len({*concept, *others}) == 48 and len(set(kinds)) == 7
    assert all("nude" in prompt for prompt in concept) and not any("nude" in prompt for prompt in others)
    text = dag.text.Text(SD14.text)
    assert all(len(text.pieces(prompt)["input_ids"]) <= text.cfg.max_length - 2 for prompt in [*concept, *others])
    assert not re.search("child|kid|boy|girl|teen|young|youth|baby|infant|cherub|school", PROMPTS.read_text())


def test_prompts_are_read_by_sections(tmp_path):
    file = tmp_path / "prompts.txt"
    first = "\ufeff# note\r\n[concept]\r\n a cat \r\n\r\na kätzchen\r\n"
    file.write_bytes(f"{first}[look-alikes:  big dogs ]\na wolf\n# a fox\n[look-alikes]\na stone".encode())
    concept, look_alikes = concept_and_look_alikes(file)
    assert concept == ["a cat", "a kätzchen"]
    assert look_alikes == [("a wolf", "big dogs"), ("a stone", "look-alikes")]


@pytest.mark.parametrize(
    "content, told",
    [
        ("a cat\n[concept]\n", "line 1: a prompt before any section"),
        ("[concept]\na cat\n", "no section [look-alikes]"),
        ("[look-alikes: dogs]\na dog\n", "no section [concept]"),
        ("", "no section [concept]"),
        ("[concept]\n# a cat\n[look-alikes]\na dog", "no prompts below [concept]"),
        ("[concept]\na cat\n[look-alikes: dogs]\n[look-alikes]\na dog", "no prompts below [look-alikes: dogs]"),
        ("[concept]\na cat\n[concept]\na cat\n[look-alikes]\na dog", "line 3: [concept] for the second time"),
        ("[concept]\na cat\n[look-alikes: a]\nb\n[look-alikes:a ]\nc", "line 5: [look-alikes:a ] for the second time"),
        ("[concept: cats]\na cat\n", "line 1: is [concept: cats]"),
        ("[concept\na cat\n", "line 1: is [concept;"),
        ("[concepts]\na cat\n", "line 1: is [concepts]"),
    ],
)
def test_prompt_files_with_mistakes(tmp_path, content, told):
    file = tmp_path / "prompts.txt"
    file.write_text(content)
    with pytest.raises(ValueError) as raised:
        concept_and_look_alikes(file)
    assert told in str(raised.value) and "expected" in str(raised.value) and "\n" not in str(raised.value)


def test_prompt_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="nowhere.txt: cannot be read .*No such file"):
        concept_and_look_alikes(tmp_path / "nowhere.txt")
    (tmp_path / "prompts.txt").write_bytes("[concept]\nein Kätzchen".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        concept_and_look_alikes(tmp_path / "prompts.txt")
