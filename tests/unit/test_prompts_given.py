"""Whatever holds prompts is taken apart in one place: columns, arrays, rows of ids, what a tokenizer gives; tables are refused."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

import hookbook as hb
from hookbook.asking import encode_prompts
from hookbook.errors import HookbookError, TokenError
from hookbook.request import Read
from hookbook.testing import toy, toy_tokenizer

TOY = toy_tokenizer()
A, B, C = (TOY.convert_tokens_to_ids(letter) for letter in "abc")
FRAME = pd.DataFrame({"text": ["ab", "c"], "label": [0, 1]})


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (TOY(["ab", "c"]), [(0, A, B), (0, C)]),
        (TOY(["ab", "c"], padding=True, return_tensors="pt"), [(0, A, B), (0, C)]),
        (TOY(["ab", "c"], padding=True, padding_side="left", return_tensors="np"), [(0, A, B), (0, C)]),
        ([TOY("ab", return_tensors="pt"), "c"], [(0, A, B), (0, C)]),
        ({"input_ids": [[A, B], [C, 1]], "attention_mask": [[1, 1], [1, 1]]}, [(A, B), (C, 1)]),
        ({"input_ids": [[A, B], [C, A]]}, [(A, B), (C, A)]),
        (torch.tensor([[0, A, B], [0, C, A]]), [(0, A, B), (0, C, A)]),
        (torch.tensor([[0, A, B]]), [(0, A, B)]),
        ([torch.tensor([[A, B]]), torch.tensor([C])], [(A, B), (C,)]),
        ([[A, B, 1], [C]], [(A, B, 1), (C,)]),
        (range(A, C), [(A, B)]),
        (FRAME["text"], [(0, A, B), (0, C)]),
        (FRAME["text"].to_numpy(), [(0, A, B), (0, C)]),
        (FRAME[["text"]].to_numpy(), [(0, A, B), (0, C)]),
        ((text for text in ("ab", "c")), [(0, A, B), (0, C)]),
    ],
)
def test_what_holds_prompts_is_taken_apart_and_padding_is_no_part_of_one(given, want):
    assert [tokens.ids for tokens in encode_prompts(toy(), given)] == want


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (FRAME, r"DataFrame is not a prompt.*'text', 'label'.*df\[\"text\"\]"),
        (FRAME.to_dict("list"), r"dict is not a prompt.*df\[\"text\"\]"),
        (FRAME.to_dict("records"), r"dict is not a prompt.*df\[\"text\"\]"),
        ([FRAME], "DataFrame is not a prompt"),
        ({"input_ids": None}, "dict is not a prompt"),
        ({"role": "user", "content": "ab"}, "give a list of messages"),
        (torch.tensor([[A, B], [C, 1]]), "begins or ends with '</s>': it may be padding.*attention_mask"),
        (torch.tensor([[1, A], [B, C]]), "it may be padding"),
        (torch.tensor([[0, A, B], [0, 1, C]]), "it may be padding"),
        ([[A, B], [C, 1]], "it may be padding"),
        ({"input_ids": [[A, B], [C, 1]]}, "it may be padding"),
        ({"input_ids": [[A, B], [C, A]], "attention_mask": [1, 1]}, "of another shape"),
        ({"input_ids": [A, B, C], "attention_mask": [1, 0, 1]}, "with a gap"),
        ({"input_ids": [A], "attention_mask": [0]}, "the prompt is empty"),
        (None, "NoneType is not a prompt"),
        (5, "int is not a prompt"),
        (Path("a"), "Path is not a prompt"),
        (b"ab", "bytes is not a prompt"),
        ([True, False], "bool is not a prompt"),
        (torch.tensor([[1.0, 2.0]]), "prompt"),
    ],
)
def test_what_holds_no_prompts_is_refused_in_words(given, words):
    with pytest.raises(TokenError, match=words):
        encode_prompts(toy(), given)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: hb.logit_lens(model, x),
        lambda model, x: hb.patchscope(model, x),
        lambda model, x: hb.patchscope(model, "ab", target=x, target_position=-1),
        lambda model, x: hb.jacobian(model, x, Read(hb.Site("resid_post", 2)), [Read(hb.Site("resid_post", 0))]),
        lambda model, x: hb.generate(model, x, max_new_tokens=1),
        lambda model, x: hb.contrast_vector(model, x, ["a", "b", "c", "d"]),
        lambda model, x: hb.contrast_vector(model, ["a", "b", "c", "d"], x),
        lambda model, x: hb.steer(model, hb.Vector.of(model, "resid_post.1", torch.ones(16)), x),
        lambda model, x: hb.in_context_vector(model, [(x, "a"), ("b", "c")]),
    ],
)
def test_no_recipe_reads_the_names_of_a_frame(call):
    with pytest.raises(HookbookError, match=r"DataFrame is not a prompt.*df\[\"text\"\]"):
        call(toy(), FRAME)
