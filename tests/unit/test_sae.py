"""What does not belong together is refused when it is attached, and bad edits of features before anything runs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from sae_lens import SAE

import hookbook as hb
from hookbook.errors import DataError, EditError, ModelError, Refused, SiteError, TokenError
from hookbook.request import Readout, Request, Row
from hookbook.sae.saelens import known_as
from hookbook.testing import toy
from tests.contract.test_sae import N, make_sae


@pytest.fixture(scope="module")
def model():
    return toy()


def with_metadata(sae, **known):
    for key, value in known.items():
        setattr(sae.cfg.metadata, key, value)
    return sae


def test_what_disagrees_is_refused(model):
    narrow = make_sae(toy(d_model=8, n_heads=1, d_head=8))
    other = with_metadata(make_sae(model), model_name="gpt2")
    unknown = with_metadata(make_sae(model), hook_name="blocks.1.hook_q")
    nameless = with_metadata(make_sae(model), hook_name=None)
    deep = with_metadata(make_sae(model), hook_name="blocks.7.hook_resid_post")
    scaled = make_sae(model, normalize_activations="expected_average_only_in")
    with_bos = with_metadata(make_sae(model), prepend_bos=True)
    for error, said, sae, more in [
        (SiteError, "reads 8 numbers at resid_post.1", narrow, {}),
        (ModelError, "an SAE of gpt2 on toy", other, {}),
        (SiteError, "hook_q", unknown, {}),
        (SiteError, "without a hook name", nameless, {}),
        (SiteError, "layers 0 to 2", deep, {}),
        (ModelError, "fold_activation_norm_scaling_factor", scaled, {}),
        (DataError, "prepend_bos=True", with_bos, {"bos": False}),
        (SiteError, "what it reads comes later", make_sae(model), {"out": "resid_pre.1"}),
        (DataError, "maxima", make_sae(model), {"maxima": torch.zeros(3)}),
        (DataError, "labels", make_sae(model), {"labels": ["French"]}),
        (ModelError, "a tuple", (make_sae(model), {}, None), {}),
        (ModelError, "a Linear", torch.nn.Linear(2, 2), {}),
    ]:
        with pytest.raises(error, match=said):
            hb.sae.attach(model, sae, **more)
    assert hb.sae.attach(model, other, same_model=True).site == hb.Site("resid_post", 1)
    assert hb.sae.attach(model, nameless, site="attn_out.2").site == hb.Site("attn_out", 2)


def test_names_of_one_model(model):
    card = "gemma-3-270m-a5fd3b62230a"  # a package's model
    for name, same in [("google/gemma-3-270m", True), ("gemma-3-270m", True), ("google/gemma-3-270m-it", False), ("gpt2", False)]:
        assert (known_as(name) == known_as(card)) == same
    assert known_as("gpt2-small") == known_as("openai-community/gpt2") == "gpt2"


def test_gemma_scope_transcoders_read_after_the_norm(model):
    metadata = {
        "model_name": "toy",
        "hook_name": "blocks.1.hook_mlp_in",
        "hook_name_out": "blocks.1.hook_mlp_out",
        "hf_hook_name": "model.layers.1.pre_feedforward_layernorm.output",
    }
    sae = make_sae(model, "jumprelu_transcoder", d_out=16, apply_b_dec_to_input=False, metadata=metadata)
    attached = hb.sae.attach(model, sae)
    assert (str(attached.site), str(attached.out)) == ("mlp_in.1", "mlp_out.1")
    sae.cfg.metadata.hf_hook_name = None
    with pytest.raises(SiteError, match="hook_mlp_in"):
        hb.sae.attach(model, sae)


def test_weights_that_transformer_lens_centred():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_vocab=258, act_fn="gelu", init_weights=True, seed=0
    )
    plain, centred = HookedTransformer(config), HookedTransformer(config)
    centred.load_state_dict(plain.state_dict())
    centred.process_weights_(fold_ln=False, center_writing_weights=True, center_unembed=False)
    for model, wanted, fits in [
        (plain, False, True),
        (centred, True, True),
        (plain, True, False),
        (centred, False, False),
        (centred, None, True),
    ]:
        model = hb.wrap(model.eval(), hb.testing.toy_tokenizer())
        sae = make_sae(model, metadata={"hook_name": "blocks.1.hook_resid_post"})
        sae.cfg.metadata.model_from_pretrained_kwargs = None if wanted is None else {"center_writing_weights": wanted}
        if fits:
            hb.sae.attach(model, sae)
        else:
            with pytest.raises(ModelError, match="center_writing_weights"):
                hb.sae.attach(model, sae)


def test_bad_edits(model):
    sae = hb.sae.attach(model, make_sae(model))
    for said, make in [
        ("nothing for features", lambda: sae.edit(3)),
        ("to and add", lambda: sae.edit(3, to=1, add=1)),
        ("no feature 24", lambda: sae.edit(N, to=1)),
        ("no feature -1", lambda: sae.edit(-1, to=1)),
        ("twice", lambda: sae.edit([1, 1], to=1)),
        ("1.5 as features", lambda: sae.edit(1.5, to=1)),
        ("'3' as features", lambda: sae.edit("3", to=1)),
        ("for 2 features", lambda: sae.edit([1, 2], to=[1.0, 2.0, 3.0])),
        ("nobody measured", lambda: sae.edit(1, times_max=2)),
        ("NaN or infinity", lambda: sae.edit(1, to=float("nan"))),
        ("no features", lambda: sae.edit([], to=1)),
        ("with float", lambda: hb.Edit("resid_post.1", 1.0, "features")),
    ]:
        with pytest.raises(EditError, match=said):
            make()
    unlike = hb.sae.attach(model, make_sae(model, "matching_pursuit", residual_threshold=0.01, max_iterations=3))
    assert unlike.encode(torch.randn(2, 16)).shape == (2, N)
    with pytest.raises(Refused, match="matching_pursuit"):
        unlike.edit(1, to=2.0)
    with pytest.raises(EditError, match="other weights"):
        other = toy(seed=1)
        other.run(Request([other.encode("ab")], [Row(0, (sae.edit(1, to=1.0),))], readout=Readout()))


def test_times_max_is_a_clamp(model):
    maxima = torch.arange(float(N))
    sae = hb.sae.attach(model, make_sae(model), maxima=maxima)
    mine, same = sae.edit([3, 5], times_max=2.0).value, sae.edit([3, 5], to=[6.0, 10.0]).value
    assert torch.equal(mine.shift.double(), same.shift) and torch.equal(mine.scale.double(), same.scale)


def test_labels_links_and_vectors(model, tmp_path):
    raw = make_sae(model)
    raw.cfg.metadata.neuronpedia_id = "toy/1-res"
    lines = tmp_path / "labels.jsonl"
    lines.write_text("\n".join(json.dumps({"index": str(i), "description": f"about {i}"}) for i in (3, 5)))
    sae = hb.sae.attach(model, raw, labels=lines)
    assert sae.labels == {3: "about 3", 5: "about 5"} and sae.links_of([3]) == {3: "https://www.neuronpedia.org/toy/1-res/3"}
    vector = hb.sae.feature(sae, 3)
    assert torch.equal(vector.values, raw.W_dec[3].float()) and vector.site == sae.site and vector.settings["label"] == "about 3"
    vector.save(tmp_path / "v.safetensors")
    assert torch.equal(hb.Vector.load(tmp_path / "v.safetensors").values, vector.values)
    with pytest.raises(ModelError, match="hb.sae.attach"):
        hb.sae.feature(raw, 3)
    lines.write_text("French\n")
    with pytest.raises(DataError, match="Neuronpedia"):
        hb.sae.attach(model, raw, labels=lines)


def test_a_checkpoint_knows_one_change_from_another(model, tmp_path):
    sae = hb.sae.attach(model, make_sae(model))
    prompts = [model.encode("a prompt")]
    for edit in (sae.edit(1, to=3.0), sae.edit(1, to=4.0), sae.edit(2, to=3.0), sae.edit(1, to=3.0, keep_error=False)):
        request = Request(prompts, [Row(0, (edit,))], readout=Readout(logits=True))
        kept = model.run(request, checkpoint=tmp_path).readout.logits
        assert torch.equal(kept, model.run(request).readout.logits)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_bos_is_the_sae_s(model):
    sae = hb.sae.attach(model, with_metadata(make_sae(model), prepend_bos=False))
    assert sae.encode_prompts("ab")[0].ids == model.encode("ab", bos=False).ids and sae.every == slice(0, None)
    sae = hb.sae.attach(model, with_metadata(make_sae(model), prepend_bos=True))
    assert sae.encode_prompts("ab")[0].ids == model.encode("ab", bos=True).ids and sae.every == slice(1, None)
    without = toy()
    without.tokenizer = copy.deepcopy(without.tokenizer)
    without.tokenizer.bos_token = None
    with pytest.raises(TokenError):
        hb.sae.attach(without, with_metadata(make_sae(model), prepend_bos=True))


def test_without_sae_lens_the_error_names_the_extra():
    script = (
        "import sys; sys.modules['sae_lens'] = None\n"
        "import hookbook as hb\n"
        "from hookbook.testing import toy\n"
        "try:\n    hb.sae.attach(toy(), object())\n"
        "except hb.errors.ModelError as error:\n    print(error)\n"
        "hb.logit_lens(toy(), 'ab')\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert 'pip install "hookbook[sae]"' in said


def test_hookbook_never_imports_sae_lens_by_itself():
    script = (
        "import sys, hookbook as hb\nfrom hookbook.testing import toy\nhb.logit_lens(toy(), 'ab'); hb.sae\nprint('sae_lens' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_a_saved_sae_comes_back(model, tmp_path):
    raw = make_sae(model)
    raw.save_model(tmp_path)
    sae = hb.sae.attach(model, SAE.load_from_disk(tmp_path))
    assert sae.name == hb.sae.attach(model, raw).name and sae.name != hb.sae.attach(model, make_sae(model, seed=1)).name
