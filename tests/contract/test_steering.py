"""Contrast vectors and steering on every adapter against a loop of plain hooks, and exported weights against the ablated run."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import hookbook as hb
from hookbook.errors import ResultError
from hookbook.request import Read, Readout, Request, Row
from tests.support.cases import assert_plain
from tests.support.formulas import flat
from tests.support.tiny import build

POSITIVE, NEGATIVE = ["good day", "goodly sum", "a good egg", "good"], ["bad day", "badly sum", "a bad egg", "bad"]
TEXTS = ["ab", "A longer one", "cde"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}<a>"


def plain_states(case, texts, sites, tokens):
    found = []
    for text in texts:
        _, read = case.plain(case.adapter.encode(text).ids, (), tuple(sites))
        found.append(torch.stack([read[site][tokens].mean(0) for site in sites]))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize(("position", "tokens"), [(-2, slice(-2, -1)), (slice(1, None), slice(1, None))])
def test_contrast_vectors_are_what_a_loop_finds(case, position, tokens):
    layers = range(case.adapter.card.n_layers)
    for name in ("resid_pre", "attn_out"):
        sites = [hb.Site(name, layer) for layer in layers]
        ours = hb.contrast_vector(case.adapter, POSITIVE, NEGATIVE, site=name, position=position, held_out=0)
        want = plain_states(case, POSITIVE, sites, tokens) - plain_states(case, NEGATIVE, sites, tokens)
        assert ours.sites == tuple(sites) and (ours.values[0] - want).abs().max() < 1e-5 * want.abs().max()


def test_steering_is_a_loop_of_hooks(case):
    adapter, n_layers = case.adapter, case.adapter.card.n_layers
    vector = hb.Vector.of(adapter, "resid_post.0", torch.randn(adapter.card.d_model, generator=torch.Generator().manual_seed(3)))
    words = (["a", "e"], ["o"])
    ours = hb.steer(adapter, vector, TEXTS, layers="all", strengths=[-2, 0.5], tokens=words)
    ids = [[adapter.encode("x" + word).ids[-1] for word in side] for side in words]
    noise = ours.settings["norms"]
    for n, text in enumerate(TEXTS):
        tokens = adapter.encode(text)
        for layer in range(n_layers):
            random = torch.randn(adapter.card.d_model, generator=torch.Generator().manual_seed(layer))
            for c, strength in enumerate((-2, 0.5)):
                for values, scores in ((vector.values, ours.scores), (random / random.norm() * noise[layer], ours.random)):
                    edit = hb.Edit(hb.Site("resid_post", layer), values * strength, "add", slice(None))
                    logits, _ = case.plain(tokens.ids, flat((edit,), tokens))
                    known = logits[-1].log_softmax(-1)
                    want = known[ids[0]].exp().sum().log() - known[ids[1]].exp().sum().log()
                    assert abs(float(scores[n, layer, c] - want)) < 1e-9
        known = case.plain(tokens.ids)[0][-1].log_softmax(-1)
        assert abs(float(ours.base[n] - (known[ids[0]].exp().sum().log() - known[ids[1]].exp().sum().log()))) < 1e-9


def test_generation_under_steering_from_chats_is_uncached_decoding_row_by_row(case, monkeypatch):
    """Ragged chats whose template writes the beginning of a sequence, which must be there once; whether a row runs alone or with others."""
    adapter = case.adapter
    monkeypatch.setattr(adapter.tokenizer, "chat_template", TEMPLATE, raising=False)
    prompts = [adapter.encode(text, chat=True) for text in TEXTS]
    assert all(
        prompt.ids.count(adapter.tokenizer.bos_token_id) == 1 and prompt.ids[0] == adapter.tokenizer.bos_token_id for prompt in prompts
    )
    assert len({len(prompt) for prompt in prompts}) > 1 and hb.tokens.after_instruction(adapter.tokenizer) == [-4, -3, -2, -1]
    vector = hb.Vector.of(adapter, "resid_pre.1", 2 * torch.randn(adapter.card.d_model, generator=torch.Generator().manual_seed(5)))
    steered = [(), (vector.edit("add", 1.5, position=slice(None), scope="all"),), tuple(hb.directional_ablation(vector))]
    steered.append(
        tuple(hb.Edit(f"mlp_out.{layer}", vector.values / 9, "rotate", slice(None), scope="all") for layer in range(adapter.card.n_layers))
    )  # type: ignore[arg-type]
    request = Request(prompts, [Row(i, edits) for i in range(3) for edits in steered], (), Readout(k=1, logits=True), generate=6)
    reply = adapter.run(request)
    assert_plain(case, request, reply, 1e-9)
    texts = hb.steer(adapter, vector, TEXTS, strengths=[1.5], score=lambda texts: len(texts[0]), generate=6, chat=True).said
    for i in range(3):
        alone = adapter.run(Request([prompts[i]], [Row(0, edits) for edits in steered], generate=6)).generated
        assert alone == reply.generated[4 * i : 4 * i + 4]
        assert texts[i][:2] == tuple(adapter.tokenizer.decode(out) for out in alone[:2])


@dataclass
class Exported:
    old: hb.Adapter
    new: hb.Adapter
    vector: hb.Vector
    folder: object


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory):
    made = {}

    def make(name: str) -> Exported:
        if name not in made:
            old = build(name, tiny_folder)
            vector = hb.Vector.of(old, "resid_post.1", torch.randn(old.card.d_model, generator=torch.Generator().manual_seed(1)))
            folder = hb.orthogonalize(old, vector, tmp_path_factory.mktemp("new") / name)
            made[name] = Exported(old, hb.load(str(folder), "nnsight", dtype="float64", device="cpu"), vector, folder)
        return made[name]

    return make


NAMES = ["bridge-gpt2", "bridge-llama", "bridge-gemma3", "nnsight-gpt2", "nnsight-llama", "nnsight-gemma3"]


@pytest.mark.parametrize("name", NAMES)
def test_exported_weights_cannot_write_the_direction(name, exported):
    it = exported(name)
    unit = it.vector.values.double() / it.vector.values.double().norm()
    reads = [
        Read(hb.Site(site, layer), slice(None))
        for site in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        for layer in range(it.old.card.n_layers)
    ]
    request = Request([it.old.encode("A longer one")], [Row(0)], reads)
    for reading, before in zip(it.new.run(request).readings, it.old.run(request).readings, strict=True):
        exact = 1e-6 if "gemma" in name else 1e-9  # transformers' norm of Gemma is float32 whatever the model's dtype
        assert (reading.values @ unit).abs().max() < exact * (1 + reading.values.abs().max()), reading.site
        assert (before.values @ unit).abs().max() > 1e-3
    state = torch.linspace(-1, 1, it.old.card.d_model, dtype=torch.float64)[None]
    assert (it.old.unembed(state) - it.new.unembed(state)).abs().max() < 1e-12  # untied, it stays as it was


@pytest.mark.parametrize("name", NAMES)
def test_exported_weights_are_the_ablated_run_where_no_norm_follows(name, exported):
    it = exported(name)
    prompts = [it.old.encode(text) for text in TEXTS]
    edits = tuple(hb.directional_ablation(it.vector))
    readout = Readout(logits=True)
    ablated, clean = (it.old.run(Request(prompts, [Row(i, some) for i in range(3)], (), readout)).readout.logits for some in (edits, ()))
    ours = it.new.run(Request(prompts, [Row(i) for i in range(3)], (), readout)).readout.logits
    assert (ablated - clean).abs().max() > 1e-2
    if "gemma" in name:  # the norm's scale no longer counts what is gone
        assert 1e-6 < (ours - ablated).abs().max() < (clean - ablated).abs().max()
    else:
        assert (ours - ablated).abs().max() < 1e-5


def test_an_export_is_a_folder_like_any_other(exported, tiny_folder, tmp_path):
    import transformers

    it = exported("bridge-gemma3")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(it.folder), dtype=torch.float64)
    assert not loaded.config.tie_word_embeddings and loaded.lm_head.weight.data_ptr() != loaded.get_input_embeddings().weight.data_ptr()
    assert transformers.AutoTokenizer.from_pretrained(str(it.folder))("ab").input_ids == it.old.tokenizer("ab").input_ids
    with pytest.raises(hb.errors.ModelError, match="overwrite"):
        hb.orthogonalize(it.old, it.vector, it.folder)
    with pytest.raises(hb.errors.ModelError, match="width"):
        hb.orthogonalize(it.old, hb.Vector.of(it.old, "mlp_act.0", torch.ones(it.old.card.d_mlp)), tmp_path / "wide")
    by_name = hb.orthogonalize(str(tiny_folder("gemma3")), it.vector, tmp_path / "by_name")
    again = transformers.AutoModelForCausalLM.from_pretrained(str(by_name), dtype=torch.float64)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(loaded.state_dict().values(), again.state_dict().values(), strict=True))
    assert not [path for path in tmp_path.iterdir() if path.name != "by_name"]  # nothing half-written


def test_a_failed_export_leaves_nothing(exported, tmp_path, monkeypatch):
    it = exported("nnsight-llama")

    def full(*args, **more):
        raise OSError("no space left")

    monkeypatch.setattr(it.old.tokenizer.__class__, "save_pretrained", full)
    with pytest.raises(ResultError, match="cannot be written.*no space"):
        hb.orthogonalize(it.old, it.vector, tmp_path / "new")
    assert not list(tmp_path.iterdir())
