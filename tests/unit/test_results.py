"""Results: saved whole, loaded equal, shown without a network."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hookbook as hb
from hookbook.errors import ResultError
from hookbook.results import Result
from hookbook.storage import FORMAT
from hookbook.testing import toy
from tests.support.samples import ODD, PROMPTS


@dataclass(frozen=True, eq=False)
class Other(Result):
    number: int


def assert_same(a: Result, b: Result) -> None:
    assert type(a) is type(b)
    for f in fields(a):
        one, other = getattr(a, f.name), getattr(b, f.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), f.name
        else:
            assert type(one) is type(other) and one == other, f.name
        if isinstance(one, hb.ModelCard):
            assert one.to_dict() == other.to_dict()  # with the versions, which == leaves out


# saved and loaded


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"precision": None, "surprisal": None},
        {"texts": (), "control_texts": ()},
        {"wanted": (), "wanted_logprobs": torch.empty(3, 9, 0), "control_wanted_logprobs": torch.empty(3, 0)},
        {"vocab": dict(enumerate(ODD))},
        {"settings": {"a": [1, (2, [3.5, None])], "b": {"c": True, "d": {}}}},
        {"logprobs": torch.full((3, 9, 4), float("-inf"))},
        {"logprobs": torch.ones(3, 9, 4).bfloat16()},
    ],
    ids=lambda change: ",".join(change) or "as it is",
)
def test_a_loaded_result_equals_the_saved_one(grid, tmp_path, change):
    saved = replace(grid, **change)
    path = saved.save(tmp_path / "deep" / "grid.hookbook")
    assert path == tmp_path / "deep" / "grid.hookbook"
    assert_same(saved, hb.Patchscope.load(path))
    assert_same(saved, hb.Patchscope.load(str(path)))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"target": hb.prompts.TOKEN_IDENTITY, "tokens": ["x", "\n"]},
        {"source_layers": ["mlp_out.1", 0]},
        {"target": ["a", "b?", "c"], "generate": 1},
    ],
)
def test_results_of_other_calls_are_loaded_equal(tmp_path, more):
    out = hb.patchscope(toy(), PROMPTS, **{"target": "cd?", **more})
    assert_same(out, hb.Patchscope.load(out.save(tmp_path / "out")))


@pytest.mark.parametrize(
    "more", [{}, {"position": slice(None), "tokens": ["x"], "languages": {"a": "no", "b": ["ja", "oui"]}, "layers": [1, "mlp_out.0"]}]
)
def test_a_logit_lens_is_loaded_equal_and_says_the_same(tmp_path, more):
    lens = hb.logit_lens(toy(), PROMPTS, **more)
    loaded = hb.LogitLens.load(lens.save(tmp_path / "lens"))
    assert_same(lens, loaded)
    assert lens.to_frame().equals(loaded.to_frame()) and loaded.token(0, 0) == lens.token(0, 0)


def test_saving_again_replaces_the_file_and_leaves_nothing_else(grid, lens, tmp_path):
    grid.save(tmp_path / "one")
    lens.save(tmp_path / "one")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert_same(lens, hb.LogitLens.load(tmp_path / "one"))


def test_the_file_is_safetensors_without_pickle(grid, tmp_path, monkeypatch):
    path = grid.save(tmp_path / "grid")
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    packed = json.loads(header.pop("__metadata__")["hookbook"])
    assert packed["format"] == FORMAT and packed["kind"] == "Patchscope" and set(packed["data"]) == {f.name for f in fields(grid)}
    assert len(raw) == 8 + size + max(tensor["data_offsets"][1] for tensor in header.values())
    assert set(header) == {f.name for f in fields(grid) if isinstance(getattr(grid, f.name), torch.Tensor)}

    def no_pickle(*args, **more):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, no_pickle)
    hb.Patchscope.load(path)


def test_what_is_not_a_result_is_not_loaded(grid, tmp_path):
    text, plain, cut, empty = (tmp_path / name for name in ("text", "plain", "cut", "empty"))
    text.write_text("This is no result, but it is long enough to have a header.")
    save_file({"a": torch.zeros(2)}, plain)
    cut.write_bytes(grid.save(tmp_path / "grid").read_bytes()[:-8])
    empty.write_bytes(b"")
    for path in (text, plain, cut, empty, tmp_path, tmp_path / "missing"):
        with pytest.raises(ResultError, match=r"save\(\) wrote") as raised:
            hb.Patchscope.load(path)
        assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "metadata",
    [
        "null",
        "no json",
        "{}",
        "[]",
        '"text"',
        "1",
        '{"format": 1, "kind": "Patchscope"}',
        '{"format": 1, "kind": "Patchscope", "data": {}}',
    ],
)
def test_other_files_with_our_key_are_not_loaded(tmp_path, metadata):
    save_file({"a": torch.zeros(2)}, tmp_path / "file", metadata={"hookbook": metadata})
    with pytest.raises(ResultError):
        hb.Patchscope.load(tmp_path / "file")


def test_another_kind_is_not_loaded(grid, tmp_path):
    path = Other(3).save(tmp_path / "other")
    assert Other.load(path).number == 3
    with pytest.raises(ResultError, match=r"is a Other: not a Patchscope. Instead: load it with Other\.load"):
        hb.Patchscope.load(path)
    with pytest.raises(ResultError, match="is a Patchscope: not a Other"):
        Other.load(grid.save(tmp_path / "grid"))


def test_a_newer_format_is_not_loaded(grid, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("hookbook.storage.FORMAT", FORMAT + 1)
        path = grid.save(tmp_path / "grid")
    with pytest.raises(ResultError, match=f"has format {FORMAT + 1}: this version reads up to {FORMAT}. Instead: upgrade"):
        hb.Patchscope.load(path)


@pytest.mark.parametrize("before", [True, False])
def test_a_save_that_fails_leaves_what_was_there(grid, lens, tmp_path, monkeypatch, before):
    path = tmp_path / "grid"
    if before:
        lens.save(path)
    old = [(file.name, file.read_bytes()) for file in tmp_path.iterdir()]

    def broken(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half of it")
        raise OSError("disk full, on purpose")

    with monkeypatch.context() as patch:
        patch.setattr("hookbook.storage.save_file", broken)
        with pytest.raises(ResultError, match="cannot be written.*on purpose"):
            grid.save(path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == old


def test_what_cannot_be_saved_leaves_nothing(grid, tmp_path):
    with pytest.raises(TypeError):
        replace(grid, settings={"map": object()}).save(tmp_path / "grid")
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_frozen(grid):
    for f in fields(grid):
        with pytest.raises(FrozenInstanceError):
            setattr(grid, f.name, None)


# numbers

COLUMNS = [
    "prompt",
    "position",
    "site",
    "layer",
    "target_site",
    "target_layer",
    "rank",
    "token",
    "logprob",
    "control_token",
    "control_logprob",
    "source_token",
    "precision",
    "surprisal",
]


def test_a_frame_has_the_columns_it_promises(grid, layers):
    frame = grid.to_frame()
    assert list(layers.to_frame().columns) == COLUMNS
    assert list(frame.columns) == [*COLUMNS, "text", "control_text", "logprob x", "control_logprob x"]
    promised = hb.Patchscope.to_frame.__doc__
    assert promised is not None and all(
        f"`{column}`" in promised for column in [*COLUMNS, "text", "control_text", "logprob t", "control_logprob t"]
    )


def test_a_frame_has_a_row_for_each_prompt_pair_and_rank(grid):
    frame = grid.to_frame()
    n, p, k = grid.token_ids.shape
    assert (n, p, k) == (3, 9, 4) and len(frame) == n * p * k
    keys = frame[["prompt", "layer", "target_layer", "rank"]]
    assert not keys.duplicated().any()
    assert sorted(map(tuple, keys.values)) == sorted(
        (text, layer, target, rank) for text in PROMPTS for layer in range(3) for target in range(3) for rank in range(4)
    )


def test_a_frames_numbers_are_the_tensors(grid):
    frame = grid.to_frame()
    n, p, k = grid.token_ids.shape

    def everywhere(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape + (1,) * (3 - x.dim())).expand(n, p, k)

    for name, x in (
        ("logprob", grid.logprobs),
        ("precision", everywhere(grid.precision)),
        ("surprisal", everywhere(grid.surprisal)),
        ("logprob x", grid.wanted_logprobs.expand(n, p, k)),
        ("control_logprob", grid.control_logprobs[:, None].expand(n, p, k)),
        ("control_logprob x", grid.control_wanted_logprobs[:, None].expand(n, p, k)),
        ("position", everywhere(torch.tensor(grid.source_positions))),
    ):
        assert torch.equal(torch.tensor(frame[name].tolist(), dtype=x.dtype).unflatten(0, (n, p, k)), x), name


def test_a_frames_words_are_the_tokens(grid):
    decode = toy().tokenizer.decode
    for row in grid.to_frame().itertuples():
        i, p = PROMPTS.index(row.prompt), row.layer * 3 + row.target_layer
        assert row.token == decode([int(grid.token_ids[i, p, row.rank])]) == grid.token(i, p, row.rank)
        assert row.control_token == decode([int(grid.control_ids[i, row.rank])]) and row.source_token == decode([int(grid.source_ids[i])])
        assert row.text == grid.texts[i][p] and row.control_text == grid.control_texts[i]
        assert (row.site, row.target_site) == ("resid_post", "resid_post")


def test_a_frame_without_precision_and_surprisal_says_so(grid):
    frame = replace(grid, precision=None, surprisal=None).to_frame()
    assert list(frame.columns) == [*COLUMNS, "text", "control_text", "logprob x", "control_logprob x"]
    assert frame["precision"].isna().all() and frame["surprisal"].isna().all()
