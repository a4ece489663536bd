"""What attention is made of: what each head adds to the stream, and patterns, also of a model whose attention has none to show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hookbook as hb
from hookbook.errors import Refused
from hookbook.request import Read, Readout, Request, Row
from hookbook.testing import toy, toy_tokenizer
from hookbook.travel.climb import Climb
from tests.contract.test_forks import differ
from tests.support.cases import Case
from tests.support.needs import require

EXACT = 1e-10
TEXTS = ("The cat sat on the mat.", "Hi")


def weights(case: Case, layer: int, tiny_folder: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attention's output projection `[n_heads * d_head, d_model]`, its bias, and the factors of the norm after it, from the checkpoint."""
    backend, _, arch = case.name.partition("-")
    if backend == "toy":
        state = case.adapter.model.state_dict()
        return state[f"blocks.{layer}.o.weight"].T, state[f"blocks.{layer}.o.bias"], None
    if backend == "hooked":
        state = case.adapter.model.state_dict()
        return state[f"blocks.{layer}.attn.W_O"].flatten(0, 1), state[f"blocks.{layer}.attn.b_O"], state.get(f"blocks.{layer}.ln1_post.w")
    state = {name: tensor.double() for name, tensor in load_file(tiny_folder(arch) / "model.safetensors").items()}
    if arch == "gpt2":
        return state[f"transformer.h.{layer}.attn.c_proj.weight"], state[f"transformer.h.{layer}.attn.c_proj.bias"], None
    out = state[f"model.layers.{layer}.self_attn.o_proj.weight"].T
    norm = 1 + state[f"model.layers.{layer}.post_attention_layernorm.weight"] if arch == "gemma3" else None
    return out, torch.zeros(out.shape[1], dtype=out.dtype), norm


def test_heads_add_up_to_attention(case, tiny_folder, monkeypatch):
    """Each is its slice of the output projection; where a norm comes after, divided by the root mean square of the whole."""
    adapter, card = case.adapter, case.adapter.card
    # transformers takes Gemma's norms in float32 whatever the model's dtype
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else x.to(torch.float32))
    tokens = adapter.encode(TEXTS[0])
    sites = [hb.Site(name, layer) for layer in range(card.n_layers) for name in ("head_z", "attn_out")]
    readings = adapter.run(Request([tokens], [Row(0)], [Read(site, slice(None)) for site in sites])).readings
    for layer in range(card.n_layers):
        z, out = readings[2 * layer].values, readings[2 * layer + 1].values
        w, bias, norm = weights(case, layer, tiny_folder)
        assert w.shape == (card.n_heads * card.d_head, card.d_model) and (norm is not None) == ("gemma3" in case.name)
        naive = torch.stack(
            [z[:, h * card.d_head : (h + 1) * card.d_head] @ w[h * card.d_head : (h + 1) * card.d_head] for h in range(card.n_heads)], 1
        )
        if norm is not None:
            scale = ((naive.sum(1) + bias).pow(2).mean(-1, keepdim=True) + (1e-5 if case.name.startswith("hooked") else 1e-6)).sqrt()
            naive, bias = naive / scale[:, None] * norm, bias / scale * norm
        added = adapter.head_contributions(layer, z)
        assert added.shape == (len(tokens), card.n_heads, card.d_model)
        assert (added - naive).abs().max() < EXACT and added.abs().max() > 1e-3
        assert (added.sum(1) + bias - out).abs().max() < EXACT


def test_a_head_adds_what_is_missing_without_it(case):
    """The control through the model itself. With a norm after attention, the others are scaled anew, so the difference is not this head's
    alone."""
    adapter, card = case.adapter, case.adapter.card
    tokens = adapter.encode(TEXTS[0])
    rows = [Row(0)] + [Row(0, (hb.Edit(hb.Site("head_z", 1, head), 0.0, "set", slice(None)),)) for head in range(card.n_heads)]
    z, out = adapter.run(Request([tokens], rows, [Read(hb.Site(name, 1), slice(None)) for name in ("head_z", "attn_out")])).readings
    added = adapter.head_contributions(1, z.values[z.rows == 0])
    for head in range(card.n_heads):
        missing = out.values[out.rows == 0] - out.values[out.rows == head + 1]
        assert ((missing - added[:, head]).abs().max() < EXACT) == ("gemma3" not in case.name)


def test_a_norm_that_is_no_root_mean_square_is_refused(monkeypatch):
    adapter = toy(seed=8)
    norm = torch.nn.LayerNorm(16, dtype=torch.float64)
    torch.nn.init.normal_(norm.bias)
    monkeypatch.setattr(type(adapter), "writer", lambda self, name, layer: (self.model.blocks[layer].o, norm))
    with pytest.raises(Refused, match="one head's contribution"):
        adapter.head_contributions(1, torch.randn(3, 16, dtype=torch.float64))


def test_heads_of_a_layer_that_is_not_there_are_refused(case):
    with pytest.raises(hb.errors.SiteError, match="this model has layers"):
        case.adapter.head_contributions(
            case.adapter.card.n_layers, torch.zeros(1, case.adapter.card.n_heads * case.adapter.card.d_head, dtype=torch.float64)
        )


def test_a_pattern_is_a_distribution_over_the_rows_own_tokens(case):
    """Padding is not among them, nor are later tokens; short rows are filled up with zeros."""
    adapter, card = case.adapter, case.adapter.card
    prompts = [adapter.encode(text) for text in TEXTS]
    sites = [hb.Site("attn_pattern", layer) for layer in range(card.n_layers)]
    readings = adapter.run(Request(prompts, [Row(0), Row(1), Row(0)], [Read(site, slice(None)) for site in sites])).readings
    for site, reading in zip(sites, readings, strict=True):
        assert reading.values.shape == (sum(map(len, (prompts[0], prompts[1], prompts[0]))), card.n_heads, len(prompts[0]))
        assert (reading.values.sum(-1) - 1).abs().max() < EXACT and (reading.values >= 0).all()
        keys = torch.arange(reading.values.shape[-1])
        assert reading.values.masked_fill((keys <= reading.positions[:, None])[:, None], 0).abs().max() < EXACT
        for row, prompt in enumerate((prompts[0], prompts[1], prompts[0])):
            found = case.plain(prompt.ids, (), (site,))[1][site]
            assert differ(reading.values[reading.rows == row], found) < EXACT
    one = adapter.run(Request(prompts, [Row(0), Row(1)], [Read(hb.Site("attn_pattern", 1, card.n_heads - 1))])).readings[0].values
    assert torch.equal(one[1], readings[1].values[readings[1].rows == 1][-1, -1]) and one.shape == (2, len(prompts[0]))


def masked(case: Case, ids: tuple[int, ...], layer: int, entries: list[tuple[int | None, int, int]]) -> torch.Tensor:
    """Logits of a run whose attention scores are minus infinity at (head or None for all, token, key) of one layer, before the softmax."""
    softmax, seen = torch.Tensor.softmax, []  # torch.nn.functional.softmax calls it, too

    def hidden(scores: torch.Tensor) -> torch.Tensor:
        if scores.dim() != 4:
            return scores
        seen.append(scores)
        if len(seen) - 1 != layer:
            return scores
        scores = scores.clone()
        for head, token, key in entries:
            scores[0, slice(None) if head is None else head, token, key] = float("-inf")
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", lambda x, *args, **more: softmax(hidden(x), *args, **more))
        logits = case.adapter.plain_logits(torch.tensor([ids]))[0]
    assert len(seen) == case.adapter.card.n_layers
    return logits


def test_a_knock_out_is_a_score_of_minus_infinity(case):
    adapter, card = case.adapter, case.adapter.card
    prompts = [adapter.encode(text) for text in TEXTS]
    n, last, layer = len(prompts[0]), card.n_heads - 1, card.n_layers - 2
    # keys inside the window of four of the Gemma of these tests; what a token does not see cannot be knocked out of it
    wanted = [
        (0, hb.Edit(hb.Site("attn_pattern", layer), op="knock_out", keys=n - 2), [(None, n - 1, n - 2)]),
        (0, hb.Edit(hb.Site("attn_pattern", layer, last), op="knock_out", keys=-1), [(last, n - 1, n - 1)]),
        (0, hb.Edit(hb.Site("attn_pattern", layer, 0), 0.0, "knock_out", slice(-4, None), keys=[n - 4, n - 3]), [
            (0, n - 4, n - 4), *((0, token, key) for token in range(n - 3, n) for key in (n - 4, n - 3)),
        ]),
        (1, hb.Edit(hb.Site("attn_pattern", layer), op="knock_out", keys=0), [(None, 2, 0)]),
    ]  # fmt: skip
    rows = [Row(prompt, (edit,)) for prompt, edit, _ in wanted] + [Row(0), Row(1)]
    said = adapter.run(Request(prompts, rows, (), Readout(logits=True))).readout.logits
    for i, (prompt, _, entries) in enumerate(wanted):
        assert (said[i] - masked(case, prompts[prompt].ids, layer, entries)[-1]).abs().max() < EXACT
        assert (said[i] - said[len(wanted) + prompt]).abs().max() > 1e-3


def test_attention_that_is_knocked_out_whole_adds_nothing(case):
    """Where nothing is left to attend to, the pattern is zero: the token gets what values of zero would give."""
    adapter, site = case.adapter, hb.Site("attn_pattern", 1)
    rows = [Row(0, (hb.Edit(site, op="knock_out"),)), Row(0, (hb.Edit(hb.Site("head_z", 1), 0.0, "set"),))]
    reply = adapter.run(Request([adapter.encode(TEXTS[0])], rows, [Read(site), Read(hb.Site("head_z", 1))], Readout(logits=True)))
    assert reply.readings[0].values[0].abs().max() == 0 and reply.readings[1].values[0].abs().max() == 0
    assert (reply.readout.logits[0] - reply.readout.logits[1]).abs().max() < EXACT


def test_only_a_knock_out_shares_what_it_takes(case):
    adapter, card = case.adapter, case.adapter.card
    tokens, site = adapter.encode(TEXTS[1]), hb.Site("attn_pattern", 1)
    edits = [hb.Edit(site, value, op, keys=[1, 2]) for value, op in ((0.0, "set"), (0.25, "add"), (0.5, "scale"), (0.0, "knock_out"))]
    (reading,) = adapter.run(Request([tokens], [Row(0), *(Row(0, (edit,)) for edit in edits)], [Read(site)])).readings
    clean = reading.values[0]
    left = clean[:, 0]
    assert (
        reading.values.sum(-1) - torch.stack([left + clean[:, 1:].sum(-1), left, 1.5 + 0 * left, (1 + left) / 2, 1 + 0 * left])
    ).abs().max() < EXACT
    assert (reading.values[4] - torch.tensor([1.0, 0, 0])).abs().max() < EXACT and reading.values.shape == (5, card.n_heads, 3)


def test_a_knock_out_after_a_negative_edit_stays_finite():
    adapter, site = toy(), hb.Site("attn_pattern", 1)
    edits = (hb.Edit(site, -0.4, "add"), hb.Edit(site, op="knock_out", keys=0))
    reply = adapter.run(Request([adapter.encode("abc")], [Row(0, edits)], [Read(site)], Readout(logits=True)))
    assert torch.isfinite(reply.readings[0].values).all() and torch.isfinite(reply.readout.logits).all()


SMALL = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.25}


def family(config: Any) -> hb.Adapter:
    """A tiny random nnsight model."""
    require("nnsight")
    from nnsight import TransformersModel

    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    module.config.architectures = [type(module).__name__]
    return hb.wrap(TransformersModel(module, tokenizer=toy_tokenizer(), task="text-generation"))


def test_a_knock_out_beside_an_attention_sink_is_a_score_of_minus_infinity():
    """GPT-OSS lets each head attend to nothing, so that its patterns add up to less than one."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    more = {
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "rope_parameters": rope,
    }
    adapter = family(transformers.GptOssConfig(**SMALL, **more, layer_types=["full_attention", "full_attention"]))
    tokens = adapter.encode("abcd")
    edit = hb.Edit("attn_pattern.1", op="knock_out", keys=1)
    try:
        said = adapter.run(Request([tokens], [Row(0, (edit,))], (), Readout(logits=True))).readout.logits[0]
    except Refused:
        return  # an answer, too
    assert (said - masked(Case("nnsight-llama", adapter), tokens.ids, 1, [(None, len(tokens) - 1, 1)])[-1]).abs().max() < 1e-4


def test_a_pattern_that_a_trace_cannot_reach_is_refused_by_name():
    adapter = family(transformers.FalconConfig(**SMALL, bos_token_id=0, eos_token_id=1))
    try:
        values = adapter.run(Request([adapter.encode("abcd")], [Row(0)], [Read("attn_pattern.1", slice(None))])).readings[0].values
    except Exception as error:
        assert isinstance(error, Refused) and "attn_pattern" in str(error), repr(error)
    else:
        assert (values.sum(-1) - 1).abs().max() < 1e-5


# attention that computes no pattern


def traced(tiny_folder: Any, arch: str, attention: str) -> hb.Adapter:
    require("nnsight")
    from nnsight import TransformersModel

    module = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(arch), dtype=torch.float64, attn_implementation=attention).eval()
    return hb.wrap(TransformersModel(module, tokenizer=toy_tokenizer(), task="text-generation"))


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
def test_patterns_of_a_model_with_fused_attention(tiny_folder, arch):
    """Read, edited and decoded as with eager attention; the model's own choice is put back, and kept where no pattern is wanted."""
    fused, eager = traced(tiny_folder, arch, "sdpa"), traced(tiny_folder, arch, "eager")
    config, during = fused.module.config, []  # type: ignore[attr-defined]
    assert config._attn_implementation == "sdpa"
    register = fused.module.register_forward_pre_hook  # type: ignore[attr-defined]
    handle = register(lambda module, args: during.append(config._attn_implementation))
    prompts = [fused.encode(text) for text in TEXTS]
    edit = hb.Edit("attn_pattern.1", op="knock_out", keys=1, scope="all")
    rows = [Row(0), Row(1), Row(0, (edit,)), Row(1, (edit,))]
    for request in (
        Request(prompts, rows, [Read("attn_pattern.0", slice(None)), Read("attn_pattern.2.1")], Readout(logits=True), generate=6),
        Request(prompts, rows[:2], [Read("attn_pattern.0", slice(None))]),
        Request(prompts, rows, (), Readout(logits=True)),
    ):
        ours, theirs = fused.run(request), eager.run(request)
        assert config._attn_implementation == "sdpa" and ours.generated == theirs.generated
        for a, b in zip(ours.readings, theirs.readings, strict=True):
            assert (a.values - b.values).abs().max() < EXACT and torch.equal(a.positions, b.positions)
        if request.readout is not None:
            assert (ours.readout.logits - theirs.readout.logits).abs().max() < EXACT  # type: ignore[union-attr]
    assert "eager" in during
    during.clear()
    fused.run(Request(prompts, rows[:2], [Read("head_z.1")], Readout(k=1)))
    handle.remove()
    assert set(during) == {"sdpa"}


def test_a_run_that_raises_puts_the_choice_of_attention_back(tiny_folder, monkeypatch):
    adapter, visit = traced(tiny_folder, "llama", "sdpa"), Climb.visit
    request = Request([adapter.encode("The cat")], [Row(0)], [Read("attn_pattern.1")])
    clean, during = adapter.run(request).readings[0].values, []

    def broken(self, name, layer, x, **more):
        if name == "attn_pattern":
            during.append(adapter.module.config._attn_implementation)  # type: ignore[attr-defined]
            raise ZeroDivisionError("on purpose")
        return visit(self, name, layer, x, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Climb, "visit", broken)
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            adapter.run(request)
    assert during == ["eager"] and adapter.module.config._attn_implementation == "sdpa"  # type: ignore[attr-defined]
    assert torch.equal(adapter.run(request).readings[0].values, clean)
