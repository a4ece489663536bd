"""What is sent to a server: it must arrive there, where this package is not, as what it was here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hookbook as hb
from hookbook import deferred
from hookbook.request import Read, Readout, Request, Row

FOLDER = Path(hb.__file__).parent / "travel"
FILES = sorted(FOLDER.glob("*.py"))
ALLOWED = {"torch", "transformers", "transformers.cache_utils", "nnsight", "numpy", "einops"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_travels_is_plain(file):
    """No decorator, data class, named tuple, or import inside a function: on the server these vanish, change, or fail."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            assert not node.decorator_list, f"{file.name}: {node.name} has a decorator"
        if isinstance(node, ast.ClassDef):
            assert {ast.unparse(base) for base in node.bases} <= {"Exception"}, f"{file.name}: {node.name} inherits"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert node in tree.body, f"{file.name}: an import inside a function"
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert all(name in ALLOWED or name.startswith("hookbook.travel.") for name in names), f"{file.name} imports {names}"
        assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "super"), f"{file.name}: super()"
        assert not isinstance(node, (ast.Global, ast.Nonlocal)), f"{file.name}: a global that is set is lost"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with its tokenizer, as a repository would hold it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hookbook.testing import toy_tokenizer

    torch.manual_seed(0)
    found = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).eval().save_pretrained(found)
    toy_tokenizer().save_pretrained(found)
    return found


ARRIVES = """
import sys
assert not any("hookbook" in path for path in sys.path)
import torch
from nnsight import TransformersModel
from nnsight.schema.request import RequestModel
try:
    import hookbook
    raise SystemExit("this package can be imported here")
except ModuleNotFoundError:
    pass
model = TransformersModel({folder!r}, task="text-generation", tokenizer={folder!r}, dtype="float32", dispatch=True,
                          device_map="cpu", attn_implementation="sdpa")
model._module.requires_grad_(False)
blob = open({blob!r}, "rb").read()
tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), {compress!r})
from nnsight.tracing.tracer import _saves, dec, inc
inc()
try:  # as the server does
    tracer.execute(tracer.info.code)
    (out,) = [value for value in tracer.info.frame.f_locals.values() if id(value) in _saves()]
finally:
    dec()
torch.save(out, {result!r})
"""


def arrives(remote, folder: Path, scratch: Path, ask) -> object:
    """The answer of a job that a process without this package ran."""
    (scratch / "empty").mkdir(exist_ok=True)
    with deferred.recording() as record:
        value = ask(remote)
        (tape,) = record.tapes.values()
        wanted = list(deferred.waiting(value))
        blob, out = scratch / "blob", scratch / "out"
        blob.write_bytes(remote.service.payload(remote.passes, tape.errand(wanted)))
        compress = remote.service._backend().compress
        code = ARRIVES.format(folder=str(folder), blob=str(blob), result=str(out), compress=compress)
        # -P and -S leave out this folder and what puts this package on the path; the libraries come back by their own folder
        libraries = Path(torch.__file__).parent.parent
        prepared = f"import sys; sys.path.append({str(libraries)!r})\n" + code
        done = subprocess.run([sys.executable, "-P", "-S", "-c", prepared], cwd=scratch / "empty", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        tape.arrive(torch.load(out, weights_only=True), wanted)
        return deferred.known(value)


def test_every_step_runs_where_this_package_is_not(folder, tmp_path):
    from nnsight import TransformersModel

    remote = hb.wrap(
        TransformersModel(str(folder), task="text-generation", tokenizer=str(folder), dtype="float32"), remote="http://127.0.0.1:9"
    )
    remote.model.to_model_key = lambda: "a name, which only a server reads"
    local = hb.wrap(
        TransformersModel(
            str(folder),
            task="text-generation",
            tokenizer=str(folder),
            dtype="float32",
            dispatch=True,
            device_map="cpu",
            attn_implementation="eager",
        )
    )

    def ask(model):
        prompts = [model.encode("abc"), model.encode("hello")]
        draw = torch.Generator().manual_seed(0)
        sites = [
            "resid_pre.1",
            "resid_post.0",
            "attn_out.2",
            "mlp_in.1",
            "mlp_out.1",
            "head_z.1.2",
            "mlp_act.0",
            "mlp_act.2.5",
            "embed",
            "final_norm",
        ]
        edits = [
            hb.Edit(site, torch.randn(hb.Site.parse(site).width(model.card), generator=draw), scope="all", position=-1) for site in sites
        ]
        edits += [hb.Edit("attn_pattern.1", op="knock_out", keys=0, scope="all"), hb.Edit("resid_post.1", 0.5, "scale")]
        rows = [Row(0), Row(1), *(Row(i % 2, (edit,)) for i, edit in enumerate(edits))]
        reads = [Read("resid_post.1"), Read("attn_pattern.2", slice(None)), Read("head_z.0.1"), Read("mlp_in.2", -2)]
        first = model.run(Request(prompts, rows, reads, Readout(k=3, logits=True), generate=4), progress=False)
        vector = first.readings[0].values[:2].mean(0)
        drawn = model.run(
            Request(prompts, [Row(0, (hb.Edit("resid_pre.2", vector),)), Row(1)], generate=3, sampling=hb.Sampling(1, top_k=9)),
            progress=False,
        )
        jacobian = hb.jacobian(model, prompts, Read("resid_post.2"), [Read("resid_post.0")], progress=False)
        lens = hb.logit_lens(
            model, prompts, position=slice(None), layers=[0, "mlp_out.1", 1], tokens=[7, 9], languages={"a": ["dog", "cat"], "b": "maus"}
        )
        return first, drawn, jacobian, lens

    ours, theirs = arrives(remote, folder, tmp_path, ask), ask(local)
    (first, drawn, jacobian, lens), (first_here, drawn_here, jacobian_here, lens_here) = ours, theirs
    for a, b in zip(first.readings, first_here.readings, strict=True):
        assert (a.values - b.values).abs().max() < 1e-4 and torch.equal(a.rows, b.rows)
    assert (first.readout.logits - first_here.readout.logits).abs().max() < 1e-4
    assert torch.equal(first.tokens, first_here.tokens) and torch.equal(drawn.tokens, drawn_here.tokens) and first.cost == first_here.cost
    assert (jacobian.matrices[0] - jacobian_here.matrices[0]).abs().max() < 1e-4
    for name in ("logprobs", "own_logprobs", "entropy", "kl", "wanted_logprobs", "language_logprobs"):
        assert (getattr(lens, name) - getattr(lens_here, name)).abs().max() < 1e-4, name
    for name in ("token_ids", "own_ids", "wanted_ranks", "language_ids"):
        assert torch.equal(getattr(lens, name), getattr(lens_here, name)), name
    assert (lens.vocab, lens.own_tokens, lens.rows, lens.settings) == (
        lens_here.vocab,
        lens_here.own_tokens,
        lens_here.rows,
        lens_here.settings,
    )


def test_of_a_lens_on_a_server_only_what_was_asked_for_comes_back(folder):
    from nnsight import TransformersModel

    remote = hb.wrap(
        TransformersModel(str(folder), task="text-generation", tokenizer=str(folder), dtype="float32"), remote="http://127.0.0.1:9"
    )
    remote.model.to_model_key = lambda: "a name, which only a server reads"
    plan = hb.logit_lens.plan(remote, "a" * 30, position=slice(None), k=2, tokens=[7])
    asked = 31 * 3 * (2 * (8 + 4 + 4) + 2 * 4 + (8 + 4)) + 31 * 8  # of each state, and the model's own next token
    assert plan.jobs == 1 and asked <= plan.bytes_down < 1.02 * asked


def test_a_relation_is_found_and_used_where_this_package_is_not(tiny_folder, tmp_path):
    """The map as promises, and edits along a map that is here; each one job."""
    from nnsight import TransformersModel

    from tests.contract.test_linear_relations import planted

    def model(**more) -> TransformersModel:
        return TransformersModel(name, task="text-generation", tokenizer=name, dtype="float32", **more)

    name = str(tiny_folder("llama"))
    remote, local = (
        hb.wrap(model(), remote="http://127.0.0.1:9"),
        hb.wrap(model(dispatch=True, device_map="cpu", attn_implementation="eager")),
    )
    remote.model.to_model_key = lambda: "a name, which only a server reads"
    asked = planted(local)
    call = dict(layers=["resid_pre.0", 1, -1], betas=(0.5, 1, 2), n_train=2, seed=3)

    def found(adapter):
        return hb.linear_relation(adapter, asked, progress=False, **call)

    here = found(local)

    def used(adapter):
        changed = hb.edit_relation(adapter, here, ranks=[1, 5], changes=3, n_unrelated=1, progress=False)
        lens = hb.attribute_lens(adapter, here, ["A longer one"], position=-3, tokens=["x"], progress=False)
        return changed, lens, hb.change_answer(adapter, here, "new", here.train[0][1], rank=5, max_new_tokens=3, progress=False)

    for theirs, ours in (
        (arrives(remote, Path(name), tmp_path, found), here),
        *zip(arrives(remote, Path(name), tmp_path, used), used(local), strict=True),
    ):
        assert type(theirs) is type(ours)
        for key, value in vars(ours).items():
            mine = vars(theirs)[key]
            if key == "controls":
                assert mine.keys() == value.keys() and all(torch.equal(mine[name], value[name]) for name in value)
            elif isinstance(value, torch.Tensor):
                assert mine.shape == value.shape and mine.dtype == value.dtype
                assert (
                    torch.equal(mine, value) if not value.is_floating_point() else ((mine - value).abs() <= 1e-4 * (1 + value.abs())).all()
                ), key
            elif key == "logprobs":
                assert torch.allclose(torch.tensor(mine), torch.tensor(value), atol=1e-4)
            elif key not in ("card", "settings", "control_logprobs", "source_card", "target_card"):
                assert mine == value, key


def test_earlier_tokens_run_again_give_the_same(folder):
    """As in a server's sandbox, which keeps no keys and values for us."""
    from nnsight import TransformersModel

    model = TransformersModel(
        str(folder),
        task="text-generation",
        tokenizer=str(folder),
        dtype="float32",
        dispatch=True,
        device_map="cpu",
        attn_implementation="eager",
    )
    adapter = hb.wrap(model)
    prompts = [adapter.encode("abcd"), adapter.encode("hi, hello")]
    draw = torch.Generator().manual_seed(1)
    edits = [
        hb.Edit(site, torch.randn(32, generator=draw), position=position, scope=scope)
        for site in ("resid_pre.1", "resid_post.0", "mlp_out.2", "embed", "final_norm")
        for position, scope in ((-1, "prompt"), (1, "prompt"), (-1, "generated"), (-1, "all"))
        if (site, position) != ("final_norm", 1)  # which nobody would see
    ]
    rows = [Row(0), Row(1), *(Row(i % 2, (edit,)) for i, edit in enumerate(edits))]
    request = Request(prompts, rows, [Read("resid_post.2", slice(None))], Readout(k=2), generate=6)
    whole = adapter.run(request, progress=False)
    adapter.remote = True  # the plan says what to run again
    from hookbook.engine import planning, runs as engine
    from hookbook.travel.passes import reach

    # what needs a trace in a sandbox needs a session here
    adapter.passes.shares, adapter.passes.call = False, lambda path, x: reach(adapter.passes.model, path)(x)
    parts = planning.plan(adapter, request)
    again = engine.merge([(part, engine._run_part(adapter, part, None, lambda done: None)[0]) for part in parts], request)
    assert torch.equal(whole.tokens, again.tokens) and len(set(map(tuple, whole.tokens.tolist()))) > 8
    assert (whole.readings[0].values - again.readings[0].values).abs().max() < 1e-4
    assert (whole.token_logprobs - again.token_logprobs).abs().max() < 1e-4


class Head:
    """An unembedding whose parts can be had."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.asked = weight, 0

    def splits(self) -> int:
        return len(self.weight)

    def unembed(self, normed: torch.Tensor, words: slice | torch.Tensor | None = None) -> torch.Tensor:
        part = self.weight if words is None else self.weight[words]
        self.asked = max(self.asked, len(part))
        return 5 * torch.tanh(normed @ part.T / 5)


@pytest.mark.parametrize("k", [0, 1, 5, 300])
def test_a_vocabulary_read_part_by_part_is_the_same(monkeypatch, k):
    from hookbook.travel import readout

    draw = torch.Generator().manual_seed(0)
    head, x = Head(torch.randn(5003, 16, generator=draw, dtype=torch.float64)), torch.randn(8, 16, generator=draw, dtype=torch.float64)
    wanted = torch.randint(5003, (8, 4), generator=draw)
    wanted[0] = torch.tensor([0, 5002, 1200, 1199])
    logprobs = head.unembed(x).log_softmax(-1)
    top = logprobs.topk(max(k, 1))
    monkeypatch.setattr(readout, "PART_BYTES", 4 * 4 * 1200)
    head.asked = 0
    with torch.no_grad():
        ids, values, said, logits, _ = readout.readout(head, x, 4, k, wanted, normed=True)
    assert 0 < head.asked < 3000 and logits is None, "it was asked for parts alone"
    assert torch.equal(ids, top.indices[:, :k]) and (values - top.values[:, :k]).abs().max().item() < 1e-12 if k else ids.shape == (8, 0)
    assert (said - logprobs.gather(-1, wanted)).abs().max() < 1e-12
    assert readout.readout(head, x, 4, k, None, logits=True, normed=True)[3].shape == (8, 5003)


@pytest.mark.parametrize(("n", "m", "most"), [(8, 4, 32), (300, 5, 64 * 5)])
def test_of_a_few_words_no_others_are_unembedded(n, m, most):
    """Of many rows with words of their own only some are unembedded at once."""
    from hookbook.travel import readout

    draw = torch.Generator().manual_seed(0)
    head, x = Head(torch.randn(5003, 16, generator=draw, dtype=torch.float64)), torch.randn(n, 16, generator=draw, dtype=torch.float64)
    words = torch.randint(5003, (n, m), generator=draw)
    want = head.unembed(x).gather(-1, words)
    head.asked = 0
    assert (readout.readout(head, x, 1000, normed=True, words=words)[4] - want).abs().max() < 1e-12 and head.asked <= most
