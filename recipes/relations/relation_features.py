"""Which features of a subject's state a linear relation turns into its answer.

A map `o = beta W s + b` is linear, and so is a sparse autoencoder's account of the state, `s = sum_i f_i d_i + b_dec + error`: what the
map says is the sum of what it says of each feature. This is about the map, which need not be what the model does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookbook.adapter import Adapter
from hookbook.asking import encode_questions
from hookbook.errors import DataError, Refused, SiteError, check_counts
from hookbook.recipe import ModelCard, later, recipe
from hookbook.recipes.features.decomposition import decompose, feature_names
from hookbook.recipes.relations.linear_relations import LinearRelation
from hookbook.recipes.relations.subjects import subject_states
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.sae import AttachedSAE, checked
from hookbook.show.plots import bars
from hookbook.show.tidy import tidy
from hookbook.sites import Site
from hookbook.tokens import vocabulary
from hookbook.vectors import Vector

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, eq=False)
class RelationFeatures(Result):
    """A map's answer as a sum over the `m` features that are active in the subject's state.

    With `F` the difference of the logits that an output means, the answer's less the mean of the others', all numbers below are parts of
    `F(o)` and sum to it. `F` is `u . o / sigma(o)` and a constant: `u` is the difference of unembedding rows behind the final norm's
    weight (and its centring, if it is a LayerNorm), and `sigma(o)` is the norm's scale, which depends on the whole output and is held at
    what it is for `o`. A model's cap on logits is not applied.
    """

    card: ModelCard
    sae: str
    """What the SAE is called, with a fingerprint of its weights."""
    relation: str
    site: Site
    subject: str
    """Whose state it is; or what made the vector that was given."""
    answer: str
    against: tuple[str, ...]
    """The other answers."""
    features: Tensor
    """`[m]`, the largest contribution first, whatever its sign."""
    activations: Tensor
    """`[m]`: `f_i`."""
    contributions: Tensor
    """`[m]`: of `beta W f_i d_i`, in logits."""
    decoder_bias: Tensor
    """Of `beta W b_dec`."""
    error: Tensor
    """Of `beta W error`, which the SAE does not reconstruct."""
    bias: Tensor
    """Of `b`, which is there whatever the subject."""
    constant: Tensor
    """Of biases of the final norm and the unembedding."""
    total: Tensor
    """`F(o)`, the sum of all these."""
    token_ids: Tensor
    """`[m, k]`: the tokens that `beta W d_i` alone says, the likeliest first."""
    token_logprobs: Tensor
    """`[m, k]` in nats."""
    vocab: dict[int, str]
    """The text of these tokens."""
    labels: dict[int, str]
    """What features were said to be about, where somebody did."""
    links: dict[int, str]
    """Features' pages on Neuronpedia, if the release has them."""
    settings: dict[str, Any]

    def to_frame(self) -> DataFrame:
        """One row for each feature, and then one for each other part: `part`, `feature`, `activation`, `contribution`, `says` (the
        likeliest tokens), `label`, `link`."""
        says = [" ".join(self.vocab[i].strip() for i in line) for line in self.token_ids.tolist()]
        numbers = zip(self.features.tolist(), self.activations.tolist(), self.contributions.tolist(), says, strict=True)
        rows = [("feature", i, *known, self.labels.get(i, ""), self.links.get(i, "")) for i, *known in numbers]
        others = {"decoder bias": self.decoder_bias, "error": self.error, "bias": self.bias, "constant": self.constant}
        rest = [(name, None, None, float(value), "", "", "") for name, value in others.items()]
        return tidy({"part feature activation contribution says label link": [*rows, *rest]})

    def plot(self, ax: Axes | None = None, *, n: int = 15) -> Axes:
        """The `n` largest contributions, and the other parts."""
        names = [*feature_names(self.features[:n].tolist(), self.labels), "other features", "decoder bias", "error", "bias"]
        others = torch.stack([self.contributions[n:].sum(), self.decoder_bias, self.error, self.bias])
        return bars(
            ax,
            names,
            torch.cat([self.contributions[:n], others]),
            f"logit of {self.answer!r} over others, by {self.relation}",
            title=self._title(),
        )

    def view(self) -> View:
        """The table of `to_frame()`."""
        return View.table(self.to_frame(), self._title())

    def _title(self) -> str:
        return f"{self.subject}: {self.answer!r} over {len(self.against)} others at {self.site}, {float(self.total):.2f} logits"


@recipe
def relation_features(
    relation: LinearRelation,
    sae: AttachedSAE,
    subject: str | Vector,
    *,
    answer: str,
    against: Sequence[str] | None = None,
    k: int = 5,
    progress: bool | None = None,
) -> RelationFeatures:
    """Which features of a subject's state a relation's map turns into an answer.

    Args:
        relation: What `hookbook.linear_relation` returned.
        sae: What `hookbook.sae.attach` gave, at one of the relation's sites.
        subject: Whose state is taken: a text, asked about behind the relation's training pairs, or the state itself as a `Vector`.
        answer: An object, of which the first token counts.
        against: Other objects; the mean logit of their first tokens, each once, is taken off. None: all others of the relation's pairs.
        k: How many tokens to keep of what each feature's row says through the map alone.
        progress: Show a progress bar; None: for long work only.

    Returns:
        `RelationFeatures`, whose parts sum to the difference of logits.

    Raises:
        EditError: The relation is of another model.
        SiteError: The SAE, or the vector, is at a site where the relation has no map.
        DataError: There is no other answer, or one begins with the answer's first token.
        Refused: The model is remote; or the SAE is a transcoder, or brings states to one size.

    Source: the map is that of Hernandez et al. 2023, arXiv:2308.09124.

    Differs: its sum over features is ours, the arithmetic of direct logit attribution.

    Example:
        found = hb.relation_features(relation, hb.sae.attach(model, sae), "France", answer="Paris")
        found.to_frame()
    """
    sae = checked(sae)
    adapter = sae.model
    relation.check_model(adapter.card)
    relation.place(sae.site)
    if sae.site != sae.out:
        raise Refused(
            "features of a transcoder in a relation", f"its decoder makes {sae.out}, and the map takes a state", f"use an SAE of {sae.site}"
        )
    if adapter.remote:
        raise Refused(
            "features of a relation on a remote model",
            "which features are active decides what is asked next, and gradients are needed",
            "load the model here",
        )
    check_counts(k=k)
    others = (
        tuple(dict.fromkeys(y for pairs in (relation.train, relation.validation, relation.test) for _, y in pairs))
        if against is None
        else tuple(against)
    )
    others = tuple(other for other in others if other != answer) if against is None else others
    if not others:
        raise DataError(f"{answer!r} against no other answer", "a logit alone means nothing", "give against=, a list of other objects")
    about = subject if isinstance(subject, str) else relation.train[0][0]
    _, ids = encode_questions(adapter, [relation.ask(about, wanted) for wanted in (answer, *others)])
    kept = [i for i, other in enumerate(ids[1:].tolist()) if other != int(ids[0])]
    if against is not None and len(kept) < len(others):
        raise DataError(f"{answer!r} against {others!r}", "two of them begin with the same token", "leave the other one out")
    others, ids = tuple(others[i] for i in kept), torch.cat([ids[:1], ids[1:][kept].unique()])
    if len(ids) < 2:
        raise DataError(
            f"{answer!r} against no other answer", "all others begin with the same token", "give against=, a list of other objects"
        )
    if isinstance(subject, Vector):
        if not subject.card.same_model(adapter.card) or subject.site != sae.site:
            raise SiteError(
                f"a state at {subject.site} of {subject.card.model_id}",
                f"the SAE is at {sae.site} of {adapter.card.model_id}",
                "give a state there",
            )
        return _told(adapter, relation, sae, subject.values, subject.recipe or "vector", answer, others, ids, k)
    states = subject_states(adapter, [relation.ask(subject, answer)], [sae.site], progress)
    return later(_told, adapter, relation, sae, states.subject[0][0], subject, answer, others, ids, k)


def _told(
    adapter: Adapter,
    relation: LinearRelation,
    sae: AttachedSAE,
    state: Tensor,
    subject: str,
    answer: str,
    others: tuple[str, ...],
    ids: Tensor,
    k: int,
) -> RelationFeatures:
    found = decompose(Vector(adapter.card, sae.site, state), sae, method="encode")
    affine = relation.affine(sae.site)
    weight, bias = affine.weight.double(), affine.bias.double()
    alone = found.rows @ weight.T
    parts = torch.cat([found.values[:, None] * alone, (weight @ found.offset)[None], (weight @ found.residual)[None], bias[None]])
    output = parts.sum(0)
    along, constant = _reading(adapter, output, ids)
    numbers = parts @ along
    contributions, (decoder_bias, error, own) = numbers[:-3], numbers[-3:].unbind(0)
    order = contributions.abs().argsort(descending=True, stable=True)
    said = adapter.readout(alone[order].to(_dtype(adapter)), k=k)
    return RelationFeatures(
        card=adapter.card,
        sae=sae.name,
        relation=relation.relation,
        site=sae.site,
        subject=subject,
        answer=answer,
        against=others,
        features=found.features[order],
        activations=found.values[order],
        contributions=contributions[order],
        decoder_bias=decoder_bias,
        error=error,
        bias=own,
        constant=constant,
        total=output @ along + constant,
        token_ids=said.topk_ids,
        token_logprobs=said.topk_logprobs,
        vocab=vocabulary(adapter, said.topk_ids),
        labels=found.labels,
        links=found.links,
        settings={"beta": float(relation.beta[relation.place(sae.site)])},
    )


def _dtype(adapter: Adapter) -> torch.dtype:
    return getattr(torch, adapter.card.dtype)


def _reading(adapter: Adapter, output: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What says the first of some tokens over the mean of the others: a direction `[d_model]` with the final norm's scale held at an
    output's, and a constant.

    At zero the final norm is linear but for its own constants (its scale does not change there), and no cap bends the logits; only the
    scale is another one.
    """
    zero = torch.zeros(1, len(output), dtype=_dtype(adapter), device=adapter.card.device, requires_grad=True)
    with torch.enable_grad():
        normed = adapter.final_norm(zero)
        logits = adapter.unembed(normed)[0, ids.to(zero.device)].double()
        difference = logits[0] - logits[1:].mean()
        (slope,) = torch.autograd.grad(difference, zero, retain_graph=True)
        with torch.no_grad():
            seen = adapter.final_norm(output[None].to(zero)) - normed
        (back,) = torch.autograd.grad(normed, zero, seen)
    slope, seen, back = (x[0].detach().double().cpu() for x in (slope, seen, back))
    return slope * (seen @ seen) / (back @ output), difference.detach().cpu()
