"""SAEs of SAELens on every adapter: encoding, reconstruction and edits of features against SAELens' own encode and decode in plain
hooks."""

from __future__ import annotations

import pytest
import torch
from sae_lens import SAE

import hookbook as hb
from hookbook.request import Read, Readout, Request, Row
from tests.support.cases import assert_plain
from tests.support.formulas import SAES, flat

N = 24
ARCHITECTURES = ["standard", "jumprelu", "topk", "gated"]


def make_sae(adapter, architecture="jumprelu", name="resid_post", layer: int | None = 1, seed=0, **more):
    """A random SAE of SAELens for an adapter's site, in float64."""
    site = hb.Site(name, layer)
    config = {
        "d_in": site.width(adapter.card),
        "d_sae": N,
        "dtype": "float64",
        "metadata": {"hook_name": site.hook_name, "model_name": adapter.card.model_id},
        "architecture": architecture,
        **({"k": 5} if architecture == "topk" else {}),
        **({"reshape_activations": "hook_z"} if name == "head_z" else {}),
        **more,
    }
    cls = SAE.get_sae_class_for_architecture(architecture)
    sae = cls(SAE.get_sae_config_class_for_architecture(architecture).from_dict(config))
    generator = torch.Generator().manual_seed(seed)
    for key, value in sae.state_dict().items():
        scale = 0.1 if key == "threshold" else 1.0 if key.startswith("W") else 0.3
        drawn = torch.randn(value.shape, generator=generator, dtype=value.dtype) * scale
        value.copy_(drawn.abs() if key == "threshold" else drawn)
    return sae


def attached(case, *args, **more):
    sae = hb.sae.attach(case.adapter, make_sae(case.adapter, *args, **more))
    SAES[sae.name] = sae.sae
    return sae


def check(case, edits, generate=0, reads=()):
    """Several rows in one climb equal plain runs through SAELens; of those with the first prompt, how many rows the edits change."""
    prompts = [case.adapter.encode("a prompt"), case.adapter.encode("another, longer")]
    rows = [Row(i % 2, edits=edit if isinstance(edit, tuple) else (edit,)) for i, edit in enumerate(edits)]
    request = Request(prompts, [Row(0), *rows], [Read(site) for site in reads], Readout(logits=True, k=2), generate=generate)
    exact = 1e-10 if case.name == "toy" or "gpt2" in case.name else 1e-6  # the others' norms compute in float32
    reply = case.adapter.run(request, progress=False)
    assert_plain(case, request, reply, exact)
    return int(((reply.said.logits[1::2] - reply.said.logits[0]).abs().amax(-1) > 1e-4).sum())


@pytest.mark.parametrize(
    ("architecture", "norm"), [*((name, "none") for name in ARCHITECTURES), ("topk", "layer_norm"), ("jumprelu", "constant_norm_rescale")]
)
def test_edits_of_features_are_hooks_between_encode_and_decode(case, architecture, norm):
    sae = attached(case, architecture, normalize_activations=norm)
    acting = check(
        case,
        [
            sae.edit(3, to=2.0),
            sae.edit([1, 5, 7], add=[1.0, -2.0, 0.5]),
            sae.edit([2, 3], scale=-1.5, position=[1, -1]),
            sae.edit([2, 3], to=0, keep_error=False),
            sae.edit(8, to=1.0, position=-1),
            sae.edit(9, to=1.0, position=-1),
            sae.keep_only([0, 4, 6]),
            sae.keep_only([0, 4, 6], keep_error=False),
            sae.splice(keep_error=False),
        ],
    )
    assert acting


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_edits_of_features_while_tokens_are_generated(case, architecture):
    sae = attached(case, architecture)
    acting = check(
        case,
        [sae.edit(3, to=5.0, scope="generated"), sae.edit([1, 2], to=4.0, scope="all"), sae.keep_only([1, 2], scope="all")],
        generate=4,
    )
    assert acting


@pytest.mark.parametrize("name", ["resid_pre", "attn_out", "mlp_out", "head_z"])
def test_every_site_an_sae_can_have(case, name):
    sae = attached(case, "standard", name)
    direction = torch.randn(sae.site.width(case.adapter.card), dtype=torch.float64)
    before = hb.Edit(sae.site, direction, "add", -1)  # what the encoder sees includes edits before
    assert check(case, [sae.edit(3, to=2.0), (before, sae.edit(3, scale=2.0)), sae.splice(keep_error=False)], reads=[sae.site])


def test_with_the_error_term_and_nothing_edited_the_logits_are_the_plain_run_s(case):
    sae = attached(case)
    prompts = [case.adapter.encode("a prompt")]
    plain, spliced = case.adapter.run(Request(prompts, [Row(0), Row(0, (sae.splice(),))], readout=Readout(logits=True))).readout.logits
    assert (plain - spliced).abs().max() < 1e-10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encode_and_reconstruct_are_saelens_own(case, architecture):
    sae = attached(case, architecture, name="head_z")
    reading = case.adapter.run(Request([case.adapter.encode("a prompt")], [Row(0)], [Read(sae.site, slice(None))])).readings[0]
    heads = reading.values.unflatten(-1, (case.adapter.card.n_heads, -1))
    acts = sae.sae.encode(heads)
    assert torch.equal(sae.encode(reading.values), acts) and acts.count_nonzero() > 0
    assert torch.equal(sae.reconstruct(reading.values), sae.sae.decode(acts).flatten(1))


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("transcoder", ("resid_pre.1", "resid_post.1")),
        ("transcoder", ("resid_post.0", "mlp_out.1")),
        *(
            (name, ("mlp_in.1", "mlp_out.1"))
            for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
        ),
    ],
)
def test_a_transcoder_reads_one_site_and_changes_another(case, architecture, names):
    adapter = case.adapter
    reads, writes = map(hb.Site.parse, names)
    metadata = {"hook_name": reads.hook_name, "hook_name_out": writes.hook_name, "model_name": adapter.card.model_id}
    raw = make_sae(adapter, architecture, d_out=writes.width(adapter.card), apply_b_dec_to_input=False, metadata=metadata)
    sae = hb.sae.attach(adapter, raw)
    assert (sae.site, sae.out) == (reads, writes)
    tokens = adapter.encode("a prompt")
    nudge = hb.Edit(reads, torch.randn(adapter.card.d_model, dtype=torch.float64), "add", slice(None))
    edits = [
        ((), sae.edit([3, 5], to=2.0), lambda f: f.index_fill(1, torch.tensor([3, 5]), 2.0)),
        ((), sae.edit(4, add=1.5, position=[1, 2], scope="prompt"), lambda f: f + 1.5 * torch.eye(N)[4]),
        ((nudge,), sae.edit(4, scale=-2.0), lambda f: f * (1 - 3 * torch.eye(N)[4])),
        ((), sae.splice(keep_error=False), None),
    ]
    rows = [Row(0, (*before, edit)) for before, edit, _ in edits]
    reply = adapter.run(Request([tokens], rows, readout=Readout(logits=True), generate=3), progress=False)
    for i, (before, edit, change) in enumerate(edits):
        plain_edits = flat(before, tokens)
        _, found = case.plain(tokens.ids, plain_edits, (reads, writes))
        acts = raw.encode(found[reads])
        skip = found[reads] @ raw.W_skip.T if "skip" in architecture else 0
        new = raw.decode(acts) + skip if change is None else found[writes] - raw.decode(acts) + raw.decode(change(acts))
        where = range(len(tokens))[1:] if isinstance(edit.position, slice) else edit.position
        logits, _ = case.plain(tokens.ids, (*plain_edits, *((writes, p, hb.Edit(writes, new[p].detach(), "set"), []) for p in where)))
        assert (reply.readout.logits[i] - logits[-1]).abs().max() < (1e-10 if case.name == "toy" or "gpt2" in case.name else 1e-6), i
        assert reply.generated[i][0] == int(logits[-1].argmax())
    assert torch.equal(sae.encode(found[reads]), raw.encode(found[reads]))


def test_steering_by_a_feature_is_a_loop_of_clamps(case):
    adapter = case.adapter
    sae = attached(case)
    texts, words = ["ab", "A longer one"], (["a", "e"], ["o"])
    ours = hb.steer_feature(sae, 3, texts, to=[1.0, -2.0], tokens=words)
    other = ours.settings["random_feature"]
    ratio = float(sae.vector(3).norm / sae.vector(other).norm)
    ids = [[adapter.encode("x" + word).ids[-1] for word in side] for side in words]
    assert other != 3 and ours.strengths == (1.0, -2.0) and ours.sites == (sae.out,)
    for n, text in enumerate(texts):
        tokens = adapter.encode(text)
        for c, value in enumerate(ours.strengths):
            for which, to, scores in ((3, value, ours.scores), (other, value * ratio, ours.random)):
                known = case.plain(tokens.ids, flat((sae.edit(which, to=to),), tokens))[0][-1].log_softmax(-1)
                want = known[ids[0]].exp().sum().log() - known[ids[1]].exp().sum().log()
                assert abs(float(scores[n, 0, c] - want)) < 1e-6
