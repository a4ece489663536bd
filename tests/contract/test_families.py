"""Families that are different: run exactly, or refused by name; never wrong in silence."""

from __future__ import annotations

import gc

import pytest
import torch
import transformers

import hookbook as hb
from hookbook.errors import ModelError, Refused
from hookbook.request import Read, Readout, Request, Row
from hookbook.testing import ToyAdapter, toy, toy_tokenizer
from tests.support.cases import Case, assert_plain
from tests.support.needs import require
from tests.support.tiny import DTYPE, tiny_config

SMALL = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64}


def traced(config) -> hb.Adapter:
    require("nnsight")
    from nnsight import TransformersModel

    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="eager").eval()
    return hb.wrap(TransformersModel(module, tokenizer=toy_tokenizer(), task="text-generation"))


def test_an_edit_and_a_read_of_the_very_first_site(case):
    adapter = case.adapter
    prompts = [adapter.encode("The cat sat"), adapter.encode("Hi")]
    site = hb.Site("resid_pre", 0)
    rows = [Row(0, (hb.Edit(site, 2.0, "scale"),)), Row(1, (hb.Edit(site, 2.0, "scale"),)), Row(0)]
    (reading,) = adapter.run(Request(prompts, rows, [Read(site, slice(None))])).readings
    for i, row in enumerate(rows):
        want = case.plain(prompts[row.prompt].ids, (), (site,))[1][site]
        if row.edits:
            want[-1] *= 2
        assert (reading.values[reading.rows == i] - want).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["toy", "bridge-gpt2", "nnsight-gpt2"])
def test_a_model_of_one_layer_is_run(name, tmp_path):
    adapter = toy(n_layers=1, dtype=DTYPE)
    if name != "toy":
        backend = {"bridge": "transformer_lens"}.get(name.split("-")[0], "nnsight")
        require(backend)
        config = tiny_config("gpt2")
        config.n_layer = 1
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
        toy_tokenizer().save_pretrained(tmp_path)
        adapter = hb.load(str(tmp_path), backend, dtype="float64", device="cpu")
    value = torch.linspace(-1, 1, adapter.card.d_model, dtype=DTYPE)
    edits = [
        hb.Edit("resid_pre.0", value, "set", 0),
        hb.Edit("resid_post.0", value),
        hb.Edit("attn_out.0", value, "add", slice(None), scope="all"),
    ]
    rows = [Row(i, more) for i in range(2) for more in [(), *((edit,) for edit in edits)]]
    reads = [Read(hb.Site(name, 0), slice(None)) for name in ("resid_pre", "mlp_out", "resid_post")]
    request = Request([adapter.encode("abcd"), adapter.encode("ef")], rows, reads, Readout(logits=True, k=3), generate=3)
    assert_plain(Case(name, adapter), request, adapter.run(request))
    grid = hb.patchscope(adapter, "abc", target="de?", generate=2)
    assert grid.to_frame()[["layer", "target_layer"]].drop_duplicates().values.tolist() == [[0, 0]] and len(grid.texts) == 1


def test_a_model_whose_tokens_see_later_ones_is_refused():
    adapter = traced(transformers.BertConfig(intermediate_size=32, initializer_range=0.5, **SMALL))
    with pytest.raises(ModelError, match="cannot be run as forks"):
        adapter.run(Request([adapter.encode("abc")], [Row(0)], [Read(hb.Site("resid_post", 1))]))


def test_an_mlp_that_sees_tokens_without_rows_is_read_and_edited():
    """OPT flattens its tokens before the MLP."""
    adapter = traced(transformers.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, init_std=0.3, dropout=0, pad_token_id=1, **SMALL))
    tokens, sites = adapter.encode("abc"), [hb.Site(name, 1) for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    plain = Request([tokens], [Row(0)], [Read(site, slice(None)) for site in sites], Readout(logits=True))
    reply = adapter.run(plain)
    pre, attn, mlp, post = (reading.values for reading in reply.readings)
    assert mlp.shape == (len(tokens), 16) and (pre + attn + mlp - post).abs().max() < 1e-10
    cut = adapter.run(Request([tokens], [Row(0, (hb.Edit(sites[2], 0.0, "scale", slice(None)),))], [Read(sites[3], slice(None))]))
    assert (cut.readings[0].values - (pre + attn)).abs().max() < 1e-10


def test_blocks_that_are_no_sum_of_their_parts_refuse_the_parts(monkeypatch):
    adapter = toy(seed=5)
    monkeypatch.setattr(adapter.model.blocks[0], "mlp_out", torch.nn.Identity())
    adapter.model.blocks[0].register_forward_hook(lambda module, args, out: 2 * out)
    request = Request([adapter.encode("abc")], [Row(0)], [Read(hb.Site("mlp_out", 0))])
    with pytest.raises(Refused, match="not what its blocks add"):
        adapter.run(request)
    stream = adapter.run(Request([adapter.encode("abc")], [Row(0)], [Read(hb.Site("resid_post", 2))], Readout(logits=True)))
    assert (stream.readout.logits - adapter.plain_logits(torch.tensor([adapter.encode("abc").ids]))[0, -1]).abs().max() < 1e-10


def test_logits_that_are_not_the_unembedding_are_refused(monkeypatch):
    adapter = toy(seed=6)
    monkeypatch.setattr(ToyAdapter, "plain_logits", lambda self, tokens: 2 * self.model(tokens))
    with pytest.raises(ModelError, match="not the unembedding"):
        hb.logit_lens(adapter, "abc")


def test_a_model_in_training_mode_is_refused(tiny_folder):
    require("nnsight")
    from nnsight import TransformersModel

    module = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), attention_dropout=0.1).train()
    with pytest.raises(ModelError, match="call model.eval"):
        hb.wrap(TransformersModel(module, tokenizer=toy_tokenizer()))


@pytest.mark.parametrize("length", [1e-30, 1e-3, 1.0, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_direction_may_have_any_length(length, dtype):
    adapter, site = toy(dtype=dtype), hb.Site("resid_post", 1)
    unit = torch.ones(16, dtype=torch.float64) / 4
    row = Row(0, (hb.Edit(site, (unit * length).to(dtype), "project_out"),))
    after = adapter.run(Request([adapter.encode("abc")], [row], [Read(site)])).readings[0].values[0]
    assert abs(float(after.double() @ unit)) < 1e-6


def test_runs_leave_no_tensors_behind(case):
    adapter = case.adapter
    edit = hb.Edit("resid_post.1", torch.ones(adapter.card.d_model, dtype=DTYPE))
    request = Request([adapter.encode("The cat"), adapter.encode("Hi")], [Row(0), Row(1, (edit,))], [Read("resid_post.1")], generate=2)

    def tensors() -> int:
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

    adapter.run(request)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(3):
            adapter.run(request)
        assert tensors() <= before + 5
    finally:
        gc.enable()


def test_a_users_own_tokens_and_template_are_kept(tiny_folder):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(tiny_folder("llama")), device="cpu")
    bridge.tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    assert hb.wrap(bridge).encode("abc", chat=True).text == "abc!"
    bridge.tokenizer.add_tokens(["<mine>"])
    assert "<mine>" in hb.wrap(bridge).encode("a<mine>b").strings


def test_half_precision_gives_numbers_close_to_float32_also_with_padding(tiny_folder):
    folder = str(tiny_folder("gemma3"))
    for backend in ("transformer_lens", "nnsight"):
        replies = []
        for dtype in ("float32", "bfloat16", "float16"):
            adapter = hb.load(folder, backend, dtype=dtype, device="cpu")
            prompts = [adapter.encode("The cat sat on the mat"), adapter.encode("Hi")]
            rows = [Row(0), Row(1), Row(1, (hb.Edit("resid_post.1", torch.ones(16)),))]
            replies.append(adapter.run(Request(prompts, rows, [], Readout(logits=True), generate=2)).readout.logits.float())
        for half in replies[1:]:
            assert torch.isfinite(half).all() and (half - replies[0]).abs().max() / replies[0].abs().max() < 0.05
