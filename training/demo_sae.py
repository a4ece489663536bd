"""Train the demonstration SAE that ships with hookbook: `python training/demo_sae.py` (about an hour on two cores that do nothing else).

Every text is the model's own: it goes on from the short beginnings below and from few-shot prompts of hookbook's tasks. The rest is
`hb.sae.train`, which keeps what is done in a folder and does not repeat it.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm.auto import tqdm

import hookbook as hb
from hookbook.models.packages import cache_folder
from hookbook.request import Request, Row, Sampling

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
SAMPLES = 3_000_000


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
    """All texts."""
    plain = [text.strip() for several in BEGINNINGS.values() for text in several.split(" | ")]
    shots = []
    for name in hb.tasks.names():
        task = hb.tasks.load(name)
        shots += [task.template.prompt(task.pairs[start : start + 5], task.pairs[start + 5][0]) for start in (0, 10)]
    return draw(model, plain, N_TOKENS, folder) + draw(model, shots, N_TOKENS_TASK, folder / "tasks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=cache_folder() / "demo-sae", help="what is kept between runs")
    parser.add_argument("--out", type=Path, default=hb.sae.DEMO)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model = hb.load(MODEL)
    every = texts(model, args.work)
    training = hb.sae.train(
        model, every, site=SITE, n_features=N_FEATURES, k=K, samples=SAMPLES, held_out=HELD_OUT, checkpoint=args.work / "sae"
    )
    training.report(args.work / "training.html")
    training.attached.sae.to(dtype=torch.float16).save_model(args.out)  # half the size
    card = hb.sae_report(hb.sae.attach(model, args.out), training.held_out_texts)
    about = {
        "what": "A demonstration SAE, trained on little text of the model itself: for tests and first steps, not for science.",
        "model": MODEL,
        "site": str(SITE),
        "architecture": f"BatchTopK of {N_FEATURES} features, k={K}, saved as JumpReLU",
        "texts": f"{training.n_texts} texts, {training.n_tokens} tokens, shown {SAMPLES / training.n_tokens:.1f} times",
        "held_out": {str(name): value for name, value in card.to_frame().set_index("metric")["value"].items()},
        "versions": model.card.versions | {"sae-lens": version("sae-lens")},
    }
    (args.out / "card.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
