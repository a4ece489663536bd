"""SAEs as people have them: folders of SAELens and of Gemma Scope 2 beside SAELens' own loaders, and names of its table.

The hub is a small one on this machine, which SAELens asks as it asks the real one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from sae_lens import SAE, StandardTrainingSAE, StandardTrainingSAEConfig
from safetensors.torch import save_file

import hookbook as hb
from hookbook.errors import ModelError, SiteError
from hookbook.sae.pretrained import found, of_folder
from hookbook.testing import toy
from tests.contract.test_sae import N, make_sae

RELEASE, ID, SMALL = "gemma-scope-2-270m-pt-res", "layer_9_width_16k_l0_medium", "layer_9_width_16k_l0_small"
PLACE = f"resid_post/{ID}"


def gemma_scope(folder: Path, sae: SAE, reads: str, writes: str | None = None, model: str = "gemma-v3-270m-pt") -> Path:
    """Write an SAE as Gemma Scope 2 has it: no decoder bias is taken from the input, names in lower case, skips from input to output."""
    folder.mkdir(parents=True)
    weights = {name.lower(): value.detach().clone() for name, value in sae.state_dict().items() if name != "W_skip"}
    if sae.cfg.apply_b_dec_to_input:
        weights["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["w_enc"]
    skip = getattr(sae, "W_skip", None)
    if skip is not None:
        weights["affine_skip_connection"] = skip.detach().T.contiguous()
    save_file({name: value.float().contiguous() for name, value in weights.items()}, folder / "params.safetensors")
    told = {"architecture": "jump_relu", "model_name": model, "hf_hook_point_in": reads, "affine_connection": skip is not None}
    told |= {"width": sae.cfg.d_sae, "l0": 60, "type": "sae"} | ({"hf_hook_point_out": writes} if writes else {})
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def test_the_shipped_sae_in_gemma_scope_2_s_layout_has_the_same_features(tmp_path):
    demo = hb.sae.demo()
    other = of_folder(gemma_scope(tmp_path / ID, demo, "model.layers.9.output"))
    assert (other.cfg.metadata.model_name, other.cfg.metadata.hook_name) == ("google/gemma-3-270m", "blocks.9.hook_resid_post")
    assert not other.cfg.apply_b_dec_to_input and other.cfg.architecture() == "jumprelu"
    x = torch.randn(64, 640, generator=torch.Generator().manual_seed(0)) * demo.b_dec.norm() / 640**0.5 + demo.b_dec
    with torch.no_grad():
        mine, theirs = demo.encode(x), other.encode(x)
        assert mine.count_nonzero() > 100 and (mine - theirs).abs().max() < 1e-3 * mine.abs().max()
        assert torch.equal(mine > 0, theirs > 0) or ((mine > 0) != (theirs > 0)).float().mean() < 1e-4  # at a threshold
        assert (demo.decode(mine) - other.decode(theirs)).norm() < 1e-4 * demo.decode(mine).norm()


class Hub(BaseHTTPRequestHandler):
    """Of the real hub's answers those that a download needs."""

    root: Path

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        place = re.fullmatch(r"/[\w.-]+/[\w.-]+/resolve/main/(.+)", self.path.partition("?")[0])
        file = self.root / place[1] if place else self.root
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            data = data[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None]
        self.send_response(206 if asked else 200)
        etag = f'"{hashlib.sha1(file.read_bytes()).hexdigest()}"'
        for name, value in {"Content-Length": len(data), "ETag": etag, "X-Repo-Commit": "a" * 40}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *said: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder that is served as every repository of a hub, and where."""
    root = tmp_path_factory.mktemp("hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield root, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_folders_are_what_saelens_own_converter_gives_and_a_name_is_found_in_the_cache(hub, monkeypatch, tmp_path):
    """Residual stream, attention, MLP, and both kinds of transcoders, through `SAE.from_pretrained`; then without a network."""
    root, endpoint = hub
    model = toy()
    before, after = "model.layers.9.pre_feedforward_layernorm.output", "model.layers.9.post_feedforward_layernorm.output"
    whole: dict = {"d_out": 16, "apply_b_dec_to_input": False}
    wanted = {
        ("res", ID): (PLACE, make_sae(model), "model.layers.9.output", None),
        ("att", ID): (f"attn_out/{ID}", make_sae(model), "model.layers.9.self_attn.o_proj.input", None),
        ("mlp", ID): (f"mlp_out/{ID}", make_sae(model), after, None),
        ("transcoders-all", SMALL): (f"transcoder_all/{SMALL}", make_sae(model, "jumprelu_transcoder", **whole), before, after),
        ("transcoders-all", f"{SMALL}_affine"): (
            f"transcoder_all/{SMALL}_affine",
            make_sae(model, "jumprelu_skip_transcoder", **whole),
            before,
            after,
        ),
    }
    for place, sae, reads, writes in wanted.values():
        gemma_scope(root / place, sae, reads, writes)
    script = "from sae_lens import SAE\nfrom hookbook.sae.pretrained import found\n" + "\n".join(
        f"SAE.from_pretrained('gemma-scope-2-270m-pt-{release}', {sae_id!r}).save_model({str(tmp_path / place)!r})"
        for (release, sae_id), (place, *_) in wanted.items()
    )
    script += f"\ntry:\n    found({(RELEASE, 'layer_12_width_1m_l0_big')!r})\nexcept ValueError as error:\n    print(error)"
    settings = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "404" in done.stdout and "fetch the folder resid_post/layer_12_width_1m_l0_big of" in done.stdout
    for place, *_ in wanted.values():
        ours, theirs = of_folder(root / place), SAE.load_from_disk(tmp_path / place)
        assert {k: v.tolist() for k, v in ours.state_dict().items()} == {k: v.tolist() for k, v in theirs.state_dict().items()}, place
        mine, others = ours.cfg.to_dict(), theirs.cfg.to_dict()
        for one in (mine, others):
            one["metadata"].pop("neuronpedia_id")  # which the table has, not the folder
        assert mine == others, place
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    kept = found((RELEASE, ID))
    assert kept.cfg.metadata.neuronpedia_id == "gemma-3-270m/9-gemmascope-2-res-16k" and kept.cfg.d_sae == N


def test_names_are_refused_with_near_ones(monkeypatch, tmp_path):
    model = toy()
    for given, said in [
        (("gemma-scope-2-270m-pt-resid_post", ID), f"use '{RELEASE}'"),
        (("nothing like it at all", ID), "use one of its"),
        ((RELEASE, "layer_9_width_16k_l0_medum"), f"use '{ID}'"),
        (RELEASE, "is a release of several.*, or another id"),
        ("gemma-scope-2-270m-pt-rez", f"such as .'{RELEASE}'"),
        (tmp_path / "nowhere", "no folder"),
    ]:
        with pytest.raises(ModelError, match=said):
            hb.sae.attach(model, given)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=f"HF_HUB_OFFLINE is set.* fetch the folder {PLACE} of google/gemma-scope-2-270m-pt"):
        hb.sae.attach(model, (RELEASE, ID))


def test_a_folder_is_attached(tmp_path):
    model = toy()
    raw = make_sae(model)
    raw.save_model(tmp_path / "own")
    here = hb.sae.attach(model, tmp_path / "own")
    assert here.name == hb.sae.attach(model, raw).name == hb.sae.attach(model, str(tmp_path / "own")).name
    raw.to(torch.float16).save_model(tmp_path / "half")
    assert hb.sae.attach(model, tmp_path / "half").sae.dtype == torch.float32
    raw = make_sae(model)
    scope = hb.sae.attach(model, gemma_scope(tmp_path / "scope", raw, "model.layers.1.output", model="toy"))
    x = torch.randn(8, 16, dtype=torch.float64)
    assert scope.site == hb.Site("resid_post", 1) and (scope.encode(x) - here.encode(x)).abs().max() < 1e-5


def test_folders_that_are_none(tmp_path):
    model = toy()
    good = gemma_scope(tmp_path / "all" / "good", make_sae(model), "model.layers.1.output", model="toy")
    for said, change in [
        ("no one JumpReLU|not one JumpReLU", {"architecture": "topk"}),
        ("hook name 'model.norm'", {"hf_hook_point_in": "model.norm"}),
        ("KeyError", {"hf_hook_point_in": None, "drop": "hf_hook_point_in"}),
    ]:
        bad = gemma_scope(tmp_path / said[:6], make_sae(model), "model.layers.1.output", model="toy")
        told = json.loads((bad / "config.json").read_text()) | change
        if "drop" in told:
            del told[told["drop"]]
        (bad / "config.json").write_text(json.dumps(told))
        with pytest.raises(ModelError, match=said):
            hb.sae.attach(model, bad)
    (tmp_path / "cut").mkdir()
    for file in good.iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[:100])
    training = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=16, d_sae=N))
    training.save_model(tmp_path / "training")
    config = json.loads((tmp_path / "training" / "cfg.json").read_text())
    (tmp_path / "training" / "cfg.json").write_text(json.dumps(config | {"architecture": "batchtopk"}))
    for folder, said in [("cut", "no SAE that SAELens can load"), ("training", "save_inference_model"), ("all", "such as .*good")]:
        with pytest.raises(ModelError, match=said):
            hb.sae.attach(model, tmp_path / folder)
    with pytest.raises(SiteError, match="layers 0 to 2"):
        hb.sae.attach(model, gemma_scope(tmp_path / "deep", make_sae(model), "model.layers.9.output", model="toy"))
