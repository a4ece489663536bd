"""What a job is: steps noted on a tape, run one after the other beside the model."""

import torch

from hookbook.travel.climb import Climb
from hookbook.travel.decoding import decode, edited
from hookbook.travel.names import find
from hookbook.travel.readout import lens, readout
from hookbook.travel.vjps import vjps

INSTEAD = "run the model here, or use a key the service trusts"


def run_errand(passes, errand, out):
    """Run the steps of an errand and leave what is wanted, by slot, in `out`.

    Args:
        passes: The model.
        errand: `steps`, each of a kind, its arguments and the slots and shapes of what it gives; `wanted` slots; whether `grad` is kept.
        out: Is filled.
    """
    passes.shares = not any(weight.is_meta for weight in passes.model._module.parameters())  # a sandbox has the structure alone
    held = {}
    for kind, data, slots, shapes in errand["steps"]:
        with torch.set_grad_enabled(errand["grad"]):
            found = step(passes, kind, fill(data, held), held)
        if isinstance(found, torch.Tensor):
            found = [found]
        for slot, shape, value in zip(slots, shapes, found, strict=True):
            if slot < 0 or value is None:
                continue
            if list(value.shape) != shape:
                raise ValueError(f"{kind} {data.get('name', '')} gave shape {list(value.shape)} instead of {shape}")
            held[slot] = value
    for slot in errand["wanted"]:
        out[slot] = held[slot].detach().cpu().clone()


def step(passes, kind, data, held):
    """Run one step."""
    if kind == "op":
        function = find(data["name"])
        return function(*data["args"], **data["kwargs"])  # pyright: ignore
    if kind == "forward":
        climb = Climb(**data["climb"])
        if not passes.shares and any(name == "attn_pattern" for name, _ in climb.inside()):
            raise ValueError(
                f"refused: attention patterns in a server's sandbox | attention there cannot be made to compute them | {INSTEAD}"
            )
        kept = held.pop(data["kept"], None)
        kept = passes.forward(data["tokens"], data["mask"], climb, kept, data["room"])
        if climb.fired != data["fires"]:
            raise ValueError(f"{data['fires'] - climb.fired} of {data['fires']} groups of edits were not reached")
        if data["keep"] is not None:
            held[data["keep"]] = kept
        return [climb.found[slot].cpu() for slot in data["found"]]
    if kind == "final_norm":
        return passes.final_norm(data["resid"].to(passes.where)).cpu()
    if kind == "unembed":
        return passes.unembed(data["normed"].to(passes.where)).cpu()
    if kind == "module":
        return passes.call(data["path"], data["x"].to(passes.where)).cpu()
    if kind == "plain":
        with passes.model.trace(data["tokens"]):
            logits = passes.model.output.logits
        return logits.cpu()
    if kind == "readout":
        asked = (data[name] for name in ("rows", "k", "tokens", "logits", "normed", "words"))
        return list(readout(passes, data["resid"].to(passes.where), *asked))
    if kind == "lens":
        return lens(passes, data["states"].to(passes.where), data["rows"], data["k"], data["tokens"], data["ranked"])
    if kind == "decode":
        return decode(passes, held.pop(data["kept"]), data["normed"].to(passes.where), data["todo"])
    if kind == "edited":
        return edited(data["values"], data["items"])
    if kind == "leaf":
        if not passes.shares:
            raise ValueError(f"refused: gradients in a server's sandbox | no graph leaves it | {INSTEAD}")
        return torch.zeros(data["shape"], dtype=data["dtype"], requires_grad=True)
    if kind == "vjps":
        return vjps(data["out"], data["leaves"], data["states"], data["chunk"], data["mean"])
    raise ValueError(f"no step {kind}")


def fill(value, held):
    """Nested data with what slots hold in place of `{"slot": n}`."""
    if isinstance(value, dict):
        if len(value) == 1 and "slot" in value:
            return held[value["slot"]]
        return {key: fill(item, held) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(fill(item, held) for item in value)
    return value
