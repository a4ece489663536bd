"""Commands in a folder with a tiny model, and results that several files look at."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

import hookbook as hb
from hookbook import cli
from hookbook.cli import recipes
from hookbook.testing import toy, toy_tokenizer
from tests.support.needs import require
from tests.support.samples import ODD, PAIRS, PROMPTS, TEXTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that often says a space, with which answers begin; and data."""
    require("transformer_lens")
    folder = tmp_path_factory.mktemp("model")
    names = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=256, initializer_range=0.25, **names)
        )
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(0.3)
        model.transformer.wte.weight[toy_tokenizer().encode(" ")[-1]].fill_(1.0)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    (folder / "pairs.json").write_text(json.dumps(PAIRS))
    (folder / "other.csv").write_text("input,output\n" + "".join(f"{x}{x},{x}\n" for x in "abcdefgh"))
    (folder / "rel.json").write_text(json.dumps({"pairs": PAIRS, "templates": ["{} is"]}))
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    (folder / "texts.txt").write_text("\ufeffone two\n\nthree\n", encoding="utf-8")  # as some editors begin a file
    (folder / "latin.txt").write_bytes(b"d\xe9j\xe0 vu")
    (folder / "empty.txt").write_text("\n")
    (folder / "folder.png").mkdir()
    (folder / "folder.html").mkdir()
    (folder / "page.html").write_text("mine")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command line in the folder: exit code, stdout and stderr."""

    def call(line: str | list[str]) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        words = shlex.split(line) if isinstance(line, str) else line
        own = ["--model", str(folder)] if words[0] in recipes.COMMANDS and "--model" not in words else []
        monkeypatch.setattr(sys, "argv", ["hookbook", *words, *own])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        code = stopped.value.code
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return call


@pytest.fixture(scope="module")
def grid() -> hb.Patchscope:
    return hb.patchscope(toy(), PROMPTS, target="cd?", target_layers="all", generate=2, tokens=["x"], k=4)


@pytest.fixture(scope="module")
def lens() -> hb.LogitLens:
    return hb.logit_lens(toy(), PROMPTS)


@pytest.fixture(scope="module")
def layers() -> hb.Patchscope:
    """One pair of layers after the other."""
    return hb.patchscope(toy(), PROMPTS, target="cd?", k=4)


@pytest.fixture(scope="module")
def odd(grid) -> hb.Patchscope:
    """A result whose every token and prompt is awkward to print."""
    vocab = {token: ODD[i % len(ODD)] for i, token in enumerate(grid.vocab)}
    sources = tuple(replace(source, text="".join(ODD).replace("$", "")) for source in grid.sources)
    return replace(grid, vocab=vocab, sources=sources, wanted=("北\n",))
