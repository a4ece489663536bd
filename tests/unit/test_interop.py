"""Vectors in other tools' formats: read by the real gguf, repeng and steering-vectors, and steering as ours do."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import gguf
import numpy
import pytest
import torch

import hookbook as hb
from hookbook import interop
from hookbook.errors import EditError, Refused, ResultError, SiteError
from hookbook.request import Readout, Request, Row
from hookbook.testing import toy
from tests.support.needs import require
from tests.support.tiny import build

EVERYWHERE = slice(None)


def vector(site: str, model: Any = None, seed: int = 0) -> hb.Vector:
    model = toy() if model is None else model
    return hb.Vector.of(model, site, torch.randn(model.card.d_model, generator=torch.Generator().manual_seed(seed)))


def logits(adapter: hb.Adapter, vectors: list[hb.Vector], prompt: str = "abcd") -> torch.Tensor:
    row = Row(0, tuple(v.edit(position=EVERYWHERE) for v in vectors))
    return adapter.run(Request([adapter.encode(prompt)], [row], (), Readout(logits=True))).readout.logits[0]


def write(path: Path, tensors: dict[str, Any], architecture: str = "controlvector", hint: str | None = "ToyModel") -> Path:
    """A file of someone else's."""
    writer = gguf.GGUFWriter(path, architecture)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    for name, values in tensors.items():
        writer.add_tensor(name, numpy.asarray(values, None if hasattr(values, "dtype") else "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def peer(monkeypatch) -> Any:
    """The real libraries. Only their training needs scikit-learn; repeng names a type that numpy 2 has not."""

    def load(name: str) -> Any:
        require(name)
        for module in ("sklearn.decomposition", "sklearn.linear_model"):
            monkeypatch.setitem(sys.modules, module, MagicMock())
        monkeypatch.setattr(numpy, "float_", numpy.float64, raising=False)
        return importlib.import_module(name)

    return load


def test_a_control_vector_is_read_as_it_was_written(tmp_path):
    early, late = vector("resid_post.0", seed=1), vector("resid_pre.2", seed=2)
    path = interop.to_repeng([late, early], tmp_path / "new" / "v.gguf")
    reader = gguf.GGUFReader(path)
    fields = {
        name: reader.get_field(f"{prefix}.{name}").contents()
        for prefix, name in (("general", "architecture"), ("controlvector", "model_hint"))
    }
    assert (
        fields == {"architecture": "controlvector", "model_hint": "ToyModel"}
        and reader.get_field("controlvector.layer_count").contents() == 2
    )
    assert [(t.name, t.tensor_type, t.data.shape) for t in reader.tensors] == [
        (f"direction.{i}", gguf.GGMLQuantizationType.F32, (16,)) for i in (0, 1)
    ]
    back = interop.from_repeng(toy(), path)
    assert list(back) == [0, 1] and [str(v.site) for v in back.values()] == ["resid_post.0", "resid_post.1"]  # resid_pre.2 is resid_post.1
    assert torch.equal(back[0].values, early.values) and torch.equal(back[1].values, late.values)
    assert back[0].card == toy().card and back[0].settings == {"file": "v.gguf", "model_type": "ToyModel"}
    again = interop.to_repeng(back, tmp_path / "again.gguf")
    assert again.read_bytes() == path.read_bytes() and sorted(p.name for p in tmp_path.iterdir()) == ["again.gguf", "new"]
    assert interop.to_repeng(early, tmp_path / "one.gguf").exists()


def test_a_direction_steers_the_block_of_its_number(tmp_path):
    """As the format has it, `direction.L` is added to what block L gives, counted from 0, at every token."""
    adapter, vectors = toy(), [vector("resid_pre.1", seed=1), vector("resid_post.2", seed=2)]
    handles = []
    for tensor in gguf.GGUFReader(interop.to_repeng(vectors, tmp_path / "v.gguf")).tensors:
        block, values = adapter.model.blocks[int(tensor.name.split(".")[1])], torch.tensor(tensor.data.copy())
        handles.append(block.register_forward_hook(lambda m, args, out, values=values: out + values))
    try:
        want = adapter.plain_logits(torch.tensor([adapter.encode("abcd").ids]))[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    assert (logits(adapter, vectors) - want).abs().max() < 1e-10
    assert (logits(adapter, list(interop.from_repeng(adapter, tmp_path / "v.gguf").values())) - want).abs().max() < 1e-10
    assert (logits(adapter, []) - want).abs().max() > 0.1


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("GPT2LMHeadModel", "gpt2"),
        ("LlamaForCausalLM", "llama"),
        ("Gemma3ForCausalLM", "gemma3_text"),
        ("GPTNeoXForCausalLM", "gpt_neox"),
        ("Own", "Own"),
    ],
)
def test_the_model_is_named_as_hugging_face_names_it(tmp_path, architecture, model_type):
    of = vector("resid_post.1")
    path = interop.to_repeng(replace(of, card=replace(of.card, architecture=architecture)), tmp_path / "v.gguf")
    assert gguf.GGUFReader(path).get_field("controlvector.model_hint").contents() == model_type
    with pytest.raises(ResultError, match=f"of type '{model_type}'.*model_type='{model_type}' if it is another name"):
        interop.from_repeng(toy(), path)
    assert torch.equal(interop.from_repeng(toy(), path, model_type=model_type)[1].values, of.values)


def test_llama_cpp_spells_model_types_without_underscores(tmp_path):
    class Gemma(type(toy())):
        def __init__(self) -> None:
            super().__init__(toy().model)
            self.card = replace(self.card, architecture="Gemma3ForCausalLM")

    for hint in ("gemma3", "gemma3_text"):
        assert list(interop.from_repeng(Gemma(), write(tmp_path / "v.gguf", {"direction.1": [1.0] * 16}, hint=hint))) == [1]
    with pytest.raises(ResultError, match="for a model of type 'gemma'"):
        interop.from_repeng(Gemma(), write(tmp_path / "v.gguf", {"direction.1": [1.0] * 16}, hint="gemma"))


def test_half_precision_files_are_read(tmp_path):
    values = torch.linspace(-3, 3, 16).half()
    back = interop.from_repeng(toy(), write(tmp_path / "v.gguf", {"direction.1": values.numpy()}))
    assert torch.equal(back[1].values, values.float())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["attn_out.1"], "holds only resid_post"),
        (["resid_pre.0"], "holds only resid_post"),
        (["embed"], "holds only resid_post"),
        (["resid_post.1", "resid_post.1"], "several vectors at one layer"),
        (["resid_post.1", "resid_pre.2"], "several vectors at one layer"),
        ([], "made of vectors"),
        (torch.ones(16), "made of vectors"),
        (None, "made of vectors"),
        (["resid_post.1", "another"], "several models"),
    ],
)
def test_what_a_control_vector_cannot_hold_is_not_written(tmp_path, given, message):
    of = vector("resid_post.2")
    another = replace(of, card=replace(of.card, model_id="another", weights=()))
    vectors = [another if site == "another" else vector(site) for site in given] if isinstance(given, list) else given
    with pytest.raises(SiteError, match=message):
        interop.to_repeng(vectors, tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        interop.to_repeng(vector("resid_post.1"), tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


GOOD = [1.0] * 16


@pytest.mark.parametrize(
    ("tensors", "more", "error", "message"),
    [
        ({"direction.1": GOOD}, {"architecture": "llama"}, ResultError, "architecture is 'llama'"),
        ({"direction.1": GOOD}, {"hint": "llama"}, ResultError, "for a model of type 'llama'"),
        ({"direction.1": GOOD}, {"hint": None}, ResultError, "for a model of type None"),
        ({}, {}, ResultError, "it has nothing where"),
        ({"direction.1": GOOD, "direction.x": GOOD}, {}, ResultError, "it has direction.x where"),
        ({"direction.-1": GOOD}, {}, ResultError, "it has direction.-1 where"),
        ({"direction.1": GOOD, "norm.weight": GOOD}, {}, ResultError, "it has norm.weight where"),
        ({"direction.3": GOOD}, {}, SiteError, "no site 'resid_post.3'"),
        ({"direction.1": GOOD[:8]}, {}, EditError, "its width there is 16"),
        ({"direction.1": [GOOD, GOOD]}, {}, EditError, "its width there is 16"),
        ({"direction.1": [float("nan"), *GOOD[1:]]}, {}, EditError, "NaN"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, tensors, more, error, message):
    with pytest.raises(error, match=message):
        interop.from_repeng(toy(), write(tmp_path / "v.gguf", tensors, **more))


def test_damaged_files_are_refused(tmp_path):
    whole = interop.to_repeng([vector("resid_post.1"), vector("resid_post.2")], tmp_path / "v.gguf").read_bytes()
    with pytest.raises(ResultError, match="cannot be read: FileNotFoundError"):
        interop.from_repeng(toy(), tmp_path / "none.gguf")
    for content in (b"", b"GGUF", b"not a gguf file", *(whole[:n] for n in range(16, len(whole), 16))):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(ResultError, match="cannot be read|is no control vector"):
            interop.from_repeng(toy(), tmp_path / "bad.gguf")


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    for name in ("gguf", "steering_vectors"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refused, match="pip install gguf"):
        interop.to_repeng(vector("resid_post.1"), tmp_path / "v.gguf")
    with pytest.raises(Refused, match="pip install --no-deps steering-vectors"):
        interop.to_steering_vectors(toy(), vector("resid_post.1"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arch", ["gpt2", "gemma3"])
def test_repeng_reads_our_file_and_steers_as_we_do(tmp_path, tiny_folder, peer, arch):
    from transformers import AutoModelForCausalLM

    adapter = build(f"bridge-{arch}", tiny_folder)
    vectors = [vector("resid_pre.2", adapter, 1), vector("resid_post.2", adapter, 2)]
    path = interop.to_repeng(vectors, tmp_path / "v.gguf")
    repeng = peer("repeng")
    control = repeng.ControlVector.import_gguf(path)
    control.export_gguf(tmp_path / "theirs.gguf")
    assert (tmp_path / "theirs.gguf").read_bytes() == path.read_bytes()

    ids = torch.tensor([adapter.encode("abcd").ids])
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(arch), dtype=torch.float64, attn_implementation="eager").eval()
    steered = repeng.ControlModel(model, [1, 2])
    assert steered.config.model_type == control.model_type
    steered.set_control(control, 1.5)
    with torch.no_grad():
        theirs = steered(ids).logits[0, -1]
    assert (logits(adapter, [1.5 * v for v in vectors]) - theirs).abs().max() < 1e-10
    assert (logits(adapter, []) - theirs).abs().max() > 0.1
    edits = [v.edit(strength=1.5, position=EVERYWHERE, scope="all") for v in vectors]
    ours = hb.generate(adapter, "abcd", edits=edits, max_new_tokens=6).ids[0]
    said = steered.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert ours and list(ours) == said[0, ids.shape[1] :][: len(ours)].tolist()


@pytest.mark.parametrize("name", ["resid_post", "attn_out", "mlp_out"])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_steering_vectors_steer_as_we_do(tiny_folder, peer, arch, name):
    from transformers import AutoModelForCausalLM

    adapter = build(f"bridge-{arch}", tiny_folder)
    peer("steering_vectors")
    vectors = [vector(f"{name}.{layer}", adapter, layer) for layer in (0, 2)]
    steering = interop.to_steering_vectors(adapter, vectors)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(arch), dtype=torch.float64, attn_implementation="eager").eval()
    with torch.no_grad(), steering.to(torch.float64).apply(model):
        theirs = model(torch.tensor([adapter.encode("abcd").ids])).logits[0, -1]
    assert (logits(adapter, vectors) - theirs).abs().max() < 1e-10
    assert (logits(adapter, []) - theirs).abs().max() > 0.05
    back = interop.from_steering_vectors(adapter, steering)
    assert list(back) == [0, 2] and all(
        torch.equal(b.values, v.values) and b.site == v.site for b, v in zip(back.values(), vectors, strict=True)
    )


def test_steering_vectors_beside_a_norm_are_refused(tiny_folder):
    """In Gemma 3 `attn_out` is what the norm after attention gives, and `self_attn` what attention gives it."""
    adapter = build("bridge-gemma3", tiny_folder)
    for layer_type, name in (("self_attn", "attn_out"), ("mlp", "mlp_out")):
        with pytest.raises(Refused, match="before the norm"):
            interop.to_steering_vectors(adapter, vector(f"{name}.1", adapter))
        with pytest.raises(Refused, match="before the norm"):
            interop.from_steering_vectors(adapter, SimpleNamespace(layer_type=layer_type, layer_activations={1: torch.ones(16)}))


def test_a_dict_of_layers_is_of_decoder_blocks():
    back = interop.from_steering_vectors(toy(), {-1: torch.arange(16), numpy.int64(0): numpy.ones(16)})
    assert [str(v.site) for v in back.values()] == ["resid_post.0", "resid_post.2"]
    assert torch.equal(back[2].values, torch.arange(16.0)) and back[2].recipe == "steering-vectors"


@pytest.mark.parametrize(
    ("steering", "error", "message"),
    [
        ({}, SiteError, "no layers"),
        ({3: torch.ones(16)}, SiteError, "no site 'resid_post.3'"),
        ({-4: torch.ones(16)}, SiteError, "no layer -4"),
        ({2: torch.ones(16), -1: torch.ones(16)}, SiteError, "each layer is one number, once"),
        ({"mlp_out.1": torch.ones(16)}, SiteError, "each layer is one number, once"),
        ({"one": torch.ones(16)}, SiteError, "one"),
        ({1: torch.ones(8)}, EditError, "its width there is 16"),
        ({1: torch.ones(1, 16)}, EditError, "its width there is 16"),
        ({1: torch.full((16,), float("inf"))}, EditError, "NaN or infinity"),
        ({1: "text"}, EditError, "give a tensor"),
        (torch.ones(3, 16), SiteError, "it has no layers"),
        (
            SimpleNamespace(layer_type="input_layernorm", layer_activations={1: torch.ones(16)}),
            SiteError,
            "'input_layernorm': it is no site",
        ),
    ],
)
def test_steering_vectors_that_do_not_fit_are_refused(steering, error, message):
    with pytest.raises(error, match=message):
        interop.from_steering_vectors(toy(), steering)


def test_a_steering_vector_is_of_one_model_and_one_kind_of_site():
    of = vector("resid_post.1")
    for vectors, message in (
        ([of, vector("mlp_out.2")], "only resid_post or only attn_out or only mlp_out"),
        (hb.Vector.of(toy(), "head_z.1.0", torch.ones(8)), "only resid_post"),
        (replace(of, card=replace(of.card, model_id="another", weights=())), "vectors of another for toy"),
        ([of, of], "several vectors at one layer"),
    ):
        with pytest.raises(SiteError, match=message):
            interop.to_steering_vectors(toy(), vectors)
