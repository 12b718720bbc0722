import json
from pathlib import Path

import pytest

from dag.cli.setup import dropped, unknown, vocabulary
from dag.config import SD14, SHAPES
from dag.text import Text
from weights.shapes.world import WORDS


@pytest.fixture(scope="module")
def clip():
    import torch

    with torch.device("meta"):
        return Text(SD14.text)


def test_known_ids(clip):
    ids = clip.tokenize(["a photograph of an astronaut riding a horse"])[0].tolist()
    assert ids == [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558] + [49407] * 68


def test_ids_of_an_outside_tokenizer(clip):
    """500 prompts: emoji, control characters, right to left, HTML entities, 10,000 characters and everyday ones.

    The ids are those of the slow CLIPTokenizer of transformers 4.46.3 without ftfy, as the original ran, on the same
    vocabulary: `CLIPTokenizer(vocab, merges, model_max_length=77)(prompt, truncation=True, padding="max_length")`; the
    padding is left out. There are no exceptions.
    """
    lines = Path(__file__).with_name("prompts.jsonl").read_text(encoding="ascii").splitlines()
    pairs = [json.loads(line) for line in lines]
    assert len(pairs) == len({prompt for prompt, _ in pairs}) == 500
    ids = clip.tokenize([prompt for prompt, _ in pairs]).tolist()
    wrong = [p for (p, known), row in zip(pairs, ids, strict=True) if row != known + [49407] * (77 - len(known))]
    assert wrong == []


def test_empty_prompt_is_start_and_padding(clip):
    assert clip.tokenize([""])[0].tolist() == [49406] + [49407] * 76


def test_every_word_of_the_world_is_one_token(shapes):
    for i, word in enumerate(WORDS):
        ids = shapes.text.tokenize([word])[0].tolist()
        assert ids[1:3] == [i, shapes.text.tokenizer.eos_token_id], word
    assert vocabulary(shapes.text) == list(WORDS)


def test_words_that_do_not_fit(clip):
    assert dropped(clip, "a " * 75) == ""
    assert dropped(clip, "a " * 75 + "red circle, here") == "red circle, here"
    assert dropped(clip, "a " * 75 + "\x00 Red\u200b  \U0001f431 \u732b") == "Red \U0001f431 \u732b"


def test_unknown_words(shapes, clip):
    assert unknown(shapes.text, "a RED circle  on night") == []
    assert unknown(shapes.text, "a pink circle, d") == ["pink", ",", "d"]
    assert unknown(clip, "anything at all") == []


def test_places(shapes, clip):
    assert shapes.text.places("a RED circle") == ([("a", [1]), ("RED", [2]), ("circle", [3])], 4)
    assert shapes.text.places("") == ([], 1)
    words, end = clip.places("a thermochromic  mug, please")
    ids = clip.tokenize(["a thermochromic  mug, please"])[0]
    assert ids[end] == clip.tokenizer.eos_token_id and (ids[1:end] != clip.tokenizer.eos_token_id).all()
    assert [word for word, _ in words] == ["a", "thermochromic", "mug", ",", "please"]
    assert [place for _, places in words for place in places] == list(range(1, end)) and len(words[1][1]) > 1
    words, end = clip.places("a " * 100)
    assert end == 76 and words[-1] == ("a", [75])


def test_shape_and_batch(shapes):
    both = shapes.text.encode(["a red circle", ""])
    assert both.shape == (2, SHAPES.text.max_length, SHAPES.text.hidden_size)
    assert (both[1] - shapes.text.encode([""])[0]).abs().max() < 1e-5


def test_wrong_vocabulary_is_refused():
    from dataclasses import replace

    with pytest.raises(ValueError, match="49408 tokens, expected 49407"):
        Text(replace(SD14.text, vocab_size=49407))
