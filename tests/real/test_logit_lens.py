"""The logit lens on real models, beside controls. Numbers are printed with -s."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb
from hookbook.tokens import beginnings
from tests.support.real import real

SENTENCE = "The Eiffel Tower is located in the city of"


@pytest.mark.parametrize("target", ["Chinese", "German"])
def test_between_two_other_languages_the_middle_says_english(target):
    """Wendler et al. 2024: at layer 13 of 18 the English word is likelier than the answer and far likelier than an unrelated English
    word; at the end the answer is."""
    model = real("gemma-3-270m")
    items = hb.prompts.translation(model, "French", target)
    lens = hb.logit_lens(model, items.prompts[::2], layers=[3, 13, 17], languages=items.languages[::2], k=1)
    assert lens.languages == (target, "English", "unrelated English")
    early, middle, end = lens.language_logprobs.exp().mean(0)
    top = torch.tensor([int(i) in lens.language_ids[n, 1].tolist() for n, i in enumerate(lens.token_ids[:, 1, 0])])
    likelier = (lens.language_logprobs[:, 1, 1] > lens.language_logprobs[:, 1, 2]).float().mean()
    print(
        f"fr -> {target}: layer 13 {middle.tolist()}, last {end.tolist()}, English is top-1 at layer 13 in {float(top.float().mean()):.2f}"
    )
    assert len(lens.prompts) >= 40 and middle[1] > middle[0] and middle[1] > 10 * middle[2] and likelier > 0.8
    assert end[0] > 0.1 and end[1] < 0.01
    assert early.max() < 0.01
    assert float(top.float().mean()) < 0.5, "a small effect here: English is seldom the likeliest token"


@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m-instruct"])
def test_layers_come_closer_to_the_model(name):
    """The divergence from the model's own distribution falls to zero, and the rank of its next token rises to the first, over prompts of
    the same kind."""
    model = real(name)
    lens = hb.logit_lens(model, SENTENCE, position=slice(1, None), tokens=[" Paris"], k=3)
    last, middle = lens.kl.shape[1] - 1, lens.kl.shape[1] // 2
    assert (lens.kl[:, last] == 0).all() and lens.precision[:, last].all()
    assert (
        lens.kl[:, last - 1].mean() < lens.kl[:, middle].mean()
        and lens.precision[:, last - 1].float().mean() > lens.precision[:, middle].float().mean()
    )
    logits = model.plain_logits(torch.tensor([lens.prompts[0].ids]))[0, 1:].float().log_softmax(-1)
    assert (lens.logprobs[:, last] - logits.topk(3).values).abs().max() < 1e-3
    assert (lens.entropy[:, last] + (logits.exp() * logits).sum(-1)).abs().max() < 1e-3
    assert lens.wanted_ranks[-1, last, 0] < 3 < 100 < lens.wanted_ranks[-1, 2, 0]


@pytest.mark.parametrize(
    ("name", "word", "expected"),
    [
        ("gemma-3-270m", "house", ["h", "ho", "hou", "hous", "house", "▁h", "▁ho", "▁hou", "▁hous", "▁house"]),
        ("gemma-3-270m", "面包", ["面", "面包", "▁面"]),
        ("gemma-3-270m", "ice cream", ["i", "ic", "ice", "▁i", "▁ic", "▁ice"]),
        ("smollm2-135m-instruct", "house", ["h", "ho", "hou", "house", "Ġh", "Ġho", "Ġhous", "Ġhouse"]),
        ("smollm2-135m-instruct", "家", ["å", "å®", "Ġå"]),  # three bytes, of which no token is the whole
        ("smollm2-135m-instruct", "étoile", ["Ã©", "Ã©t", "ĠÃ©"]),  # the first character is a token: no single bytes
    ],
)
def test_the_tokens_with_which_a_word_begins(name, word, expected):
    tokenizer = real(name).tokenizer
    assert sorted(tokenizer.convert_ids_to_tokens(beginnings(word, tokenizer))) == sorted(expected)


@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m-instruct"])
def test_the_tokens_are_all_that_begin_a_word(name):
    """Against a search of the whole vocabulary."""
    tokenizer = real(name).tokenizer
    mark = "▁" if "▁" in tokenizer.get_vocab() else "Ġ"
    for word in ("flower", "window", "a"):
        want = {i for text, i in tokenizer.get_vocab().items() if text.removeprefix(mark) and word.startswith(text.removeprefix(mark))}
        assert {*beginnings(word, tokenizer)} == want and len(want) >= 2
    ids = tokenizer("花", add_special_tokens=False).input_ids
    assert ids[0] in beginnings("花", tokenizer)


def test_a_character_that_is_no_token_begins_with_its_first_byte():
    """Of SentencePiece with byte fallback; a character found by looking for one."""
    tokenizer = real("gemma-3-270m").tokenizer
    odd = next(chr(code) for code in range(0x3400, 0x30000) if len(tokenizer(chr(code), add_special_tokens=False).input_ids) > 1)
    assert tokenizer.convert_ids_to_tokens(beginnings(odd, tokenizer)) == [f"<0x{odd.encode()[0]:02X}>"]
    assert tokenizer(odd, add_special_tokens=False).input_ids[0] == beginnings(odd, tokenizer)[0]
