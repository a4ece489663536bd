"""Train the demonstration SAE that ships with hookbook: `python training/demo_sae.py` (about an hour on two cores).

Every text is the model's own: it goes on from the short beginnings below and from few-shot prompts of hookbook's tasks. The trainer is
SAELens' own. Steps that are done are kept in a folder and not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

import hookbook as hb
from hookbook.packages import cache_folder
from hookbook.request import Read, Request, Row, Sampling

MODEL, SITE = "gemma-3-270m", "resid_post.9"
BEGINNINGS = {
    "English": """The | In 1998, | A new study | She opened the door and | We are looking for | How to | According to the | My favourite | Once upon a time |
        The company said on Monday | For many people | Dear Sir or Madam, | The recipe | Last summer, my family | Scientists have | Welcome to our | If you want to |
        The history of | It was raining when | During the match | The president | There are three reasons why | I have never | The city of | Our hotel | This book |
        The patient | Prices of | Chapter 1 | The film | Children should | Water is | He was born in | The river | In this paper, we | Question: What is | Abstract. |
        The best way to learn | On the other hand, | The law""",
    "French": """La | Le gouvernement | Il était une fois | Dans cet article, | Nous avons | Les enfants | Pour faire | Depuis des années, | Elle a ouvert la porte et |
        Mon voisin | Le film | La ville de Lyon | C'est | Vous pouvez | L'histoire de | Hier soir, | Une étude | Les prix | Je n'ai jamais | Le match""",
    "German": "Die | Der Minister | Es war einmal | In diesem Artikel | Wir haben | Gestern Abend | Das Buch | Viele Menschen | Ich habe noch nie | Die Stadt",
    "Spanish": "La | El gobierno | Había una vez | En este artículo | Los niños | Ayer por la noche | Mi vecino | Una nueva | Nunca he | La ciudad de",
    "Italian": "Il governo | C'era una volta | La città di | Ieri sera | I bambini | Questo libro",
    "Portuguese": "O governo | Era uma vez | A cidade de | Ontem à noite | As crianças | Este livro",
    "other": 'Город | В этом году | 我们 | 中国的 | 日本の | de | Het | 2. | 12 + 7 = | $x^2$ | <h1> | def main(): | import | <div class= | {"name": | SELECT | # | - | public class | \\section{',
}
N_EACH = 16
"""Texts of each beginning."""
N_TOKENS = 112
TASKS = hb.tasks.names()
N_FEATURES, K = 4096, 40
SAMPLES, BATCH = 4_000_000, 2048


def beginnings() -> list[str]:
    """What the texts begin with: the list above, and five pairs of each task."""
    plain = [text.strip() for texts in BEGINNINGS.values() for text in texts.split(" | ")]
    shots = []
    for name in TASKS:
        task = hb.tasks.load(name)
        shots += [task.template.prompt(task.pairs[start : start + 5], task.pairs[start + 5][0]) for start in (0, 10)]
    return plain + shots


def texts(model: hb.Adapter, folder: Path, per_request: int = 16) -> list[list[int]]:
    """What the model says, as token ids, its beginning-of-sequence token and the beginning among them."""
    path = folder / "texts.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    every = [model.encode(text) for text in beginnings()]
    found = []
    for start in tqdm(range(0, len(every), per_request), desc="texts"):
        prompts = every[start : start + per_request]
        rows = [Row(i) for i in range(len(prompts)) for _ in range(N_EACH)]
        reply = model.run(
            Request(prompts, rows, generate=N_TOKENS, sampling=Sampling(seed=start, top_k=400)), progress=False, checkpoint=folder / f"texts-{start}"
        )
        for row, tokens in zip(rows, reply.tokens.tolist(), strict=True):
            found.append([*prompts[row.prompt].ids, *(token for token in tokens if token >= 0)])
    torch.save(found, path)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=cache_folder() / "demo-sae", help="what is kept between runs")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    found = texts(hb.load(MODEL), args.work)
    print(len(found), sum(map(len, found)))
