"""What the MLP takes, on every backend: the input of the real MLP module of plain transformers, read and set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import hookbook as hb
from hookbook.errors import Refused
from hookbook.request import Read, Readout, Request, Row
from hookbook.testing import toy, toy_tokenizer
from tests.support.needs import require
from tests.support.tiny import ARCHITECTURES, DTYPE, build

EXACT = 1e-10
IDS = [0, 41, 7, 99, 200, 3]
SIZES = {
    "vocab_size": 258,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
WIDE = {"intermediate_size": 32, "initializer_range": 0.3, **SIZES}
FAMILIES = {
    "parallel attention": (lambda: transformers.GPTNeoXConfig(use_parallel_residual=True, **WIDE), "gpt_neox.layers.0.mlp"),
    "one norm for both": (lambda: transformers.PhiConfig(**WIDE), "model.layers.0.mlp"),
    "no norm before": (lambda: transformers.Olmo2Config(**WIDE), "model.layers.0.mlp"),
    "scaled": (lambda: transformers.GraniteConfig(residual_multiplier=0.5, **WIDE), "model.layers.0.mlp"),
    "no module, tokens without rows": (
        lambda: transformers.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, init_std=0.3, dropout=0, **SIZES),
        "model.decoder.layers.0.fc1",
    ),
}


def plain(model: Any, path: str, value: torch.Tensor | None = None, token: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module takes, `[pos, width]`, and the next token's logits; `value` is put in its place at one token."""
    found = []

    def before(module: Any, args: tuple) -> tuple:
        x = args[0].clone().reshape(len(IDS), -1)
        if value is not None:
            x[token] = value
        found.append(x.clone())
        return x.reshape(args[0].shape), *args[1:]

    handle = model.get_submodule(path).register_forward_pre_hook(before)
    try:
        logits = model(torch.tensor([IDS])).logits[0, -1].detach()
    finally:
        handle.remove()
    return found[0].detach(), logits


def assert_same(adapter: hb.Adapter, model: Any, path: str, layer: int) -> None:
    site, value = hb.Site("mlp_in", layer), torch.linspace(-2, 2, adapter.card.d_model, dtype=DTYPE)
    tokens = adapter.encode(IDS)
    rows = [Row(0), Row(0, (hb.Edit(site, value, "set", 2),)), Row(0, (hb.Edit(site, value, "set", -1),))]
    reply = adapter.run(Request([tokens], rows, [Read(site, slice(None))], Readout(logits=True)))
    wanted = [plain(model, path), plain(model, path, value, 2), plain(model, path, value, len(IDS) - 1)]
    for i, (taken, logits) in enumerate(wanted):
        (reading,) = reply.readings
        assert (reading.values[reading.rows == i] - taken).abs().max() < EXACT, (path, i)
        assert (reply.readout.logits[i] - logits).abs().max() < EXACT, (path, i)  # type: ignore[union-attr]
        assert i == 0 or (logits - wanted[0][1]).abs().max() > 1e-3, (path, i)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("backend", ["bridge", "nnsight"])
def test_it_is_the_input_of_the_real_mlp(backend, arch, tiny_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(arch), dtype=DTYPE, attn_implementation="eager").eval()
    blocks = "transformer.h" if arch == "gpt2" else "model.layers"
    norm = {"gpt2": "ln_2", "llama": "post_attention_layernorm", "gemma3": "pre_feedforward_layernorm"}[arch]
    adapter = build(f"{backend}-{arch}", tiny_folder)
    for layer in (0, 1):
        normed = []
        handle = model.get_submodule(f"{blocks}.{layer}.{norm}").register_forward_hook(
            lambda m, args, out, to=normed: to.append(out[0].detach())
        )
        taken, _ = plain(model, f"{blocks}.{layer}.mlp")
        handle.remove()
        assert torch.equal(taken, normed[0])
        assert_same(adapter, model, f"{blocks}.{layer}.mlp", layer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_it_is_the_input_of_the_real_mlp_in_families_of_other_shapes(backend, family, tmp_path):
    require(backend)
    config, path = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(), dtype=DTYPE, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and "bias" not in name else 0.0, std=0.2)
    model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    adapter = hb.load(str(tmp_path), backend, dtype="float64", device="cpu")
    if adapter.refuses(hb.Site("mlp_out", 0)) is None:
        assert_same(adapter, model, path, 0)
    else:  # what the MLP adds is no module's output here, so that nothing can be checked
        assert (backend, family) == ("nnsight", "scaled")
        with pytest.raises(Refused, match="mlp_in of Granite"):
            adapter.run(Request([adapter.encode(IDS)], [Row(0)], [Read("mlp_in.0")]))


@pytest.mark.hooked
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_on_a_hooked_transformer_it_is_the_norm_with_its_weight_which_no_hook_point_has(arch, tiny_folder):
    adapter: Any = build(f"hooked-{arch}", tiny_folder)
    model, tokens = adapter.model, torch.tensor([IDS])
    block = model.blocks[1]
    with torch.no_grad():
        torch.nn.init.normal_(block.ln2.w, mean=1.0, std=0.2, generator=torch.Generator().manual_seed(0))
        _, cache = model.run_with_cache(tokens, prepend_bos=False)
        want = block.ln2(cache["blocks.1.hook_resid_mid"])[0]
    (reading,) = adapter.run(Request([adapter.encode(IDS)], [Row(0)], [Read("mlp_in.1", slice(None))])).readings
    assert (reading.values - want).abs().max() < EXACT
    assert (reading.values - cache["blocks.1.ln2.hook_normalized"][0]).abs().max() > 1e-3


@pytest.mark.hooked
def test_where_norms_are_folded_it_is_what_the_norm_gives(tiny_folder):
    """The one case in which `ln2.hook_normalized` is this tensor."""
    adapter: Any = build("hooked-gpt2", tiny_folder)
    adapter.model.process_weights_(fold_ln=True)
    _, cache = adapter.model.run_with_cache(torch.tensor([IDS]), prepend_bos=False)
    (reading,) = hb.wrap(adapter.model).run(Request([adapter.encode(IDS)], [Row(0)], [Read("mlp_in.1", slice(None))])).readings
    assert (reading.values - cache["blocks.1.ln2.hook_normalized"][0]).abs().max() < EXACT


def test_the_names_that_are_left_out_are_other_tensors(tiny_folder):
    """Of a TransformerBridge: why `Site.from_hook_name` refuses them, and takes `hook_in` and `hook_out`."""
    bridge: Any = build("bridge-gemma3", tiny_folder).model
    bridge.set_use_hook_mlp_in(True)
    _, cache = bridge.run_with_cache(torch.tensor([IDS]))
    for one, other in (("hook_in", "hook_resid_pre"), ("hook_out", "hook_resid_post")):
        assert torch.equal(cache[f"blocks.1.{one}"], cache[f"blocks.1.{other}"])
        assert hb.Site.from_hook_name(f"blocks.1.{one}") == hb.Site.from_hook_name(f"blocks.1.{other}")
    pairs = [
        ("hook_mlp_in", "mlp.hook_in"),
        ("ln2.hook_normalized", "mlp.hook_in"),
        ("mlp.hook_out", "hook_mlp_out"),
        ("attn.hook_out", "hook_attn_out"),
    ]
    for one, other in pairs:
        assert (cache[f"blocks.1.{one}"] - cache[f"blocks.1.{other}"]).abs().max() > 1e-3


def test_an_mlp_that_takes_something_else_as_well_is_refused():
    """Its addition would be only in part of what is written there."""
    adapter, kept = toy(seed=3), []
    block: Any = adapter.model.blocks[0]
    block.ln2.register_forward_hook(lambda m, args, out: kept.append(out))
    block.mlp.register_forward_hook(lambda m, args, out: out + kept.pop())
    with pytest.raises(Refused, match="mlp_in of ToyModel: nothing shows that what is written there is all that its MLPs take"):
        adapter.run(Request([adapter.encode("abc")], [Row(0)], [Read("mlp_in.0")]))
    adapter.run(Request([adapter.encode("abc")], [Row(0)], [Read("mlp_out.1")]))
