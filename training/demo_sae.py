"""Train the demonstration SAE that ships with hookbook: `python training/demo_sae.py` (about an hour on two cores that do nothing else).

Every text is the model's own: it goes on from the short beginnings below and from few-shot prompts of hookbook's tasks. The trainer is
SAELens' own (`SAETrainer`, BatchTopK, saved as the JumpReLU SAE it is at inference). Steps that are done are kept in a folder and not
repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm

import hookbook as hb
from hookbook.models.packages import cache_folder
from hookbook.request import Read, Request, Row, Sampling

MODEL, SITE = "gemma-3-270m", hb.Site("resid_post", 9)
BEGINNINGS = {
    "English": (
        "The | In 1998, | A new study | She opened the door and | We are looking for | How to | According to the | "
        "My favourite | Once upon a time |\n        "
        "The company said on Monday | For many people | Dear Sir or Madam, | The recipe | Last summer, my family | "
        "Scientists have | Welcome to our | If you want to |\n        "
        "The history of | It was raining when | During the match | The president | There are three reasons why | I have never | "
        "The city of | Our hotel | This book |\n        "
        "The patient | Prices of | Chapter 1 | The film | Children should | Water is | He was born in | The river | "
        "In this paper, we | Question: What is | Abstract. |\n        "
        "The best way to learn | On the other hand, | The law"
    ),
    "French": (
        "La | Le gouvernement | Il était une fois | Dans cet article, | Nous avons | Les enfants | Pour faire | "
        "Depuis des années, | Elle a ouvert la porte et |\n        "
        "Mon voisin | Le film | La ville de Lyon | C'est | Vous pouvez | L'histoire de | Hier soir, | Une étude | Les prix | "
        "Je n'ai jamais | Le match"
    ),
    "German": (
        "Die | Der Minister | Es war einmal | In diesem Artikel | Wir haben | Gestern Abend | Das Buch | Viele Menschen | "
        "Ich habe noch nie | Die Stadt"
    ),
    "Spanish": (
        "La | El gobierno | Había una vez | En este artículo | Los niños | Ayer por la noche | Mi vecino | Una nueva | "
        "Nunca he | La ciudad de"
    ),
    "Italian": "Il governo | C'era una volta | La città di | Ieri sera | I bambini | Questo libro",
    "Portuguese": "O governo | Era uma vez | A cidade de | Ontem à noite | As crianças | Este livro",
    "other": (
        "Город | В этом году | 我们 | 中国的 | 日本の | de | Het | 2. | 12 + 7 = | $x^2$ | <h1> | "
        'def main(): | import | <div class= | {"name": | SELECT | # | - | public class | \\section{'
    ),
}
N_EACH = 16
"""Texts of each beginning."""
N_TOKENS, N_TOKENS_TASK = 112, 32
"""How many tokens are drawn after a beginning, and after a few-shot prompt."""
HELD_OUT = 0.05
N_FEATURES, K = 4096, 40
SAMPLES, BATCH = 3_000_000, 2048


def draw(model: hb.Adapter, beginnings: list[str], n_tokens: int, folder: Path, at_once: int = 16) -> list[list[int]]:
    """What the model says, as token ids, with its beginning-of-sequence token and the beginning."""
    found = []
    for start in tqdm(range(0, len(beginnings), at_once), desc="texts"):
        prompts = [model.encode(text) for text in beginnings[start : start + at_once]]
        rows = [Row(i) for i in range(len(prompts)) for _ in range(N_EACH)]
        request = Request(prompts, rows, generate=n_tokens, sampling=Sampling(seed=start, top_k=400))
        reply = model.run(request, progress=False, checkpoint=folder / f"texts-{start}")
        for row, tokens in zip(rows, reply.tokens.tolist(), strict=True):
            found.append([*prompts[row.prompt].ids, *(token for token in tokens if token >= 0)])
    return found


def texts(model: hb.Adapter, folder: Path) -> list[list[int]]:
    """All texts, in an order of their own."""
    plain = [text.strip() for several in BEGINNINGS.values() for text in several.split(" | ")]
    shots = []
    for name in hb.tasks.names():
        task = hb.tasks.load(name)
        shots += [task.template.prompt(task.pairs[start : start + 5], task.pairs[start + 5][0]) for start in (0, 10)]
    found = draw(model, plain, N_TOKENS, folder) + draw(model, shots, N_TOKENS_TASK, folder / "tasks")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order]


def states(model: hb.Adapter, every: list[list[int]], at_once: int = 64) -> Tensor:
    """`[n, d_model]` at the site, of every token but the first."""
    found = []
    for start in tqdm(range(0, len(every), at_once), desc="states"):
        prompts = [model.encode(ids) for ids in every[start : start + at_once]]
        found.append(
            model.run(Request(prompts, [Row(i) for i in range(len(prompts))], [Read(SITE, slice(1, None))]), progress=False)
            .readings[0]
            .values
        )
    return torch.cat(found)


def batches(x: Tensor) -> Iterator[Tensor]:
    """Shuffled states for ever."""
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - BATCH + 1, BATCH):
            yield x[order[start : start + BATCH]]


def train(x: Tensor) -> BatchTopKTrainingSAE:
    """An SAE of SAELens, by its trainer."""
    torch.manual_seed(0)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=x.shape[1],
            d_sae=N_FEATURES,
            k=K,
            normalize_activations="expected_average_only_in",
            metadata=SAEMetadata(
                model_name=MODEL,
                hook_name=SITE.hook_name,
                prepend_bos=True,
                exclude_special_tokens=True,
                dataset_path="sampled from the model itself",
            ),
        )
    )
    sae.b_dec.data = x[: 1 << 16].mean(0) * (x.shape[1] ** 0.5 / x[: 1 << 16].norm(dim=-1).mean())
    steps = SAMPLES // BATCH
    config = SAETrainerConfig(
        total_training_samples=SAMPLES,
        train_batch_size_samples=BATCH,
        lr=4e-4,
        lr_end=4e-5,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 4,
        dead_feature_window=200,
        n_batches_for_norm_estimate=20,
    )
    return SAETrainer(config, sae, batches(x)).fit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=cache_folder() / "demo-sae", help="what is kept between runs")
    parser.add_argument("--out", type=Path, default=hb.sae.DEMO)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model = hb.load(MODEL)
    every = texts(model, args.work)
    held_out = every[: int(HELD_OUT * len(every))]
    kept = args.work / "states.pt"
    x = torch.load(kept) if kept.exists() else states(model, every[len(held_out) :])
    torch.save(x, kept)
    train(x).save_inference_model(args.work / "sae")
    sae = SAE.load_from_disk(args.work / "sae", dtype="float16")  # half the size
    args.out.mkdir(parents=True, exist_ok=True)
    sae.save_model(args.out)
    card = hb.sae_report(hb.sae.attach(model, hb.sae.demo()), held_out)
    about = {
        "what": "A demonstration SAE, trained on little text of the model itself: for tests and first steps, not for science.",
        "model": MODEL,
        "site": str(SITE),
        "architecture": f"BatchTopK of {N_FEATURES} features, k={K}, saved as JumpReLU",
        "texts": f"{len(every) - len(held_out)} texts, {len(x)} tokens, shown {SAMPLES / len(x):.1f} times",
        "held_out": {str(name): value for name, value in card.to_frame().set_index("metric")["value"].items()},
        "versions": model.card.versions | {"sae-lens": version("sae-lens")},
    }
    (args.out / "card.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
