"""A recipe book for hooks: published interpretability methods as one call each, on TransformerLens and nnsight models.

    import hookbook as hb

    model = hb.load("gemma-3-270m")          # or wrap a bridge, a HookedTransformer or an nnsight model: hb.wrap(model)
    grid = hb.patchscope(model, "Diana, Princess of Wales", target=hb.prompts.ENTITY_DESCRIPTION, generate=20)
    grid.to_frame(), grid.plot(), grid.view()

Names are loaded when they are first used, so that importing hookbook imports no model library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Adapter": "adapter",
    "ContrastVectors": "recipes.steering.contrast_vectors",
    "DirectionChoice": "recipes.steering.refusal_direction",
    "InContextVectors": "recipes.steering.in_context_shift",
    "Steering": "recipes.steering.steering",
    "contrast_vector": "recipes.steering.contrast_vectors",
    "directional_ablation": "recipes.steering.refusal_direction",
    "in_context_vector": "recipes.steering.in_context_shift",
    "orthogonalize": "recipes.steering.weights",
    "select_direction": "recipes.steering.refusal_direction",
    "steer": "recipes.steering.steering",
    "steer_feature": "recipes.features.steering",
    "FeatureAttribution": "recipes.features.attribution",
    "FeatureBackpatch": "recipes.features.backpatching",
    "FeatureSweep": "recipes.features.effects",
    "backpatch_features": "recipes.features.backpatching",
    "feature_attribution": "recipes.features.attribution",
    "feature_sweep": "recipes.features.effects",
    "Affine": "maps",
    "At": "tokens",
    "Edit": "request",
    "Relation": "relations",
    "Task": "tasks",
    "Backpatch": "recipes.hops.backpatching",
    "HopKnockOut": "recipes.hops.hop_knock_out",
    "HopReadability": "recipes.hops.hop_readability",
    "TwoHops": "recipes.hops.two_hops",
    "hop_knock_out": "recipes.hops.hop_knock_out",
    "hop_readability": "recipes.hops.hop_readability",
    "two_hops": "recipes.hops.two_hops",
    "Composition": "recipes.vectors.task_vectors",
    "FeatureActivations": "recipes.features.reading",
    "FeatureExamples": "recipes.features.examples",
    "FeaturePatchscope": "recipes.features.patchscopes",
    "FeatureVector": "recipes.features.decomposition",
    "RelationFeatures": "recipes.relations.relation_features",
    "feature_patchscope": "recipes.features.patchscopes",
    "relation_features": "recipes.relations.relation_features",
    "FunctionVectors": "recipes.vectors.function_vectors",
    "HeadEffects": "recipes.vectors.function_vectors",
    "TaskVectors": "recipes.vectors.task_vectors",
    "Vector": "vectors",
    "backpatch": "recipes.hops.backpatching",
    "compose": "recipes.vectors.task_vectors",
    "feature_activations": "recipes.features.reading",
    "feature_examples": "recipes.features.examples",
    "function_vector": "recipes.vectors.function_vectors",
    "head_effects": "recipes.vectors.function_vectors",
    "known": "recipes.vectors.task_vectors",
    "task_vector": "recipes.vectors.task_vectors",
    "Generation": "recipes.steering.generation",
    "LinearRelation": "recipes.relations.linear_relations",
    "RelationEdits": "recipes.relations.relation_edits",
    "attribute_lens": "recipes.relations.linear_relations",
    "change_answer": "recipes.relations.relation_edits",
    "edit_relation": "recipes.relations.relation_edits",
    "linear_relation": "recipes.relations.linear_relations",
    "HookbookError": "errors",
    "LogitLens": "recipes.reading.logit_lens",
    "ModelCard": "adapter",
    "Patchscope": "recipes.reading.patchscopes",
    "Plan": "engine.planning",
    "SAEReport": "recipes.features.sae_report",
    "Sampling": "request",
    "Site": "sites",
    "Handle": "remote.service",
    "generate": "recipes.steering.generation",
    "job": "remote.service",
    "jacobian": "recipes.reading.jacobians",
    "load": "models.loading",
    "logit_lens": "recipes.reading.logit_lens",
    "patchscope": "recipes.reading.patchscopes",
    "sae_report": "recipes.features.sae_report",
    "wrap": "models.loading",
}
_MODULES = (
    "adapters",
    "errors",
    "hops",
    "interop",
    "prompts",
    "recipes",
    "relations",
    "request",
    "results",
    "sae",
    "scores",
    "sites",
    "tasks",
    "testing",
    "tokens",
)

__all__ = sorted([*_HOME, "errors", "hops", "interop", "prompts", "relations", "sae", "scores", "tasks", "testing"])  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    __version__: str
    from hookbook import errors as errors
    from hookbook import hops as hops
    from hookbook import interop as interop
    from hookbook import prompts as prompts
    from hookbook import relations as relations
    from hookbook import sae as sae
    from hookbook import scores as scores
    from hookbook import tasks as tasks
    from hookbook import testing as testing
    from hookbook.adapter import Adapter as Adapter
    from hookbook.adapter import ModelCard as ModelCard
    from hookbook.engine.planning import Plan as Plan
    from hookbook.errors import HookbookError as HookbookError
    from hookbook.maps import Affine as Affine
    from hookbook.models.loading import load as load
    from hookbook.models.loading import wrap as wrap
    from hookbook.recipes.features.attribution import FeatureAttribution as FeatureAttribution
    from hookbook.recipes.features.attribution import feature_attribution as feature_attribution
    from hookbook.recipes.features.backpatching import FeatureBackpatch as FeatureBackpatch
    from hookbook.recipes.features.backpatching import backpatch_features as backpatch_features
    from hookbook.recipes.features.decomposition import FeatureVector as FeatureVector
    from hookbook.recipes.features.effects import FeatureSweep as FeatureSweep
    from hookbook.recipes.features.effects import feature_sweep as feature_sweep
    from hookbook.recipes.features.examples import FeatureExamples as FeatureExamples
    from hookbook.recipes.features.examples import feature_examples as feature_examples
    from hookbook.recipes.features.patchscopes import FeaturePatchscope as FeaturePatchscope
    from hookbook.recipes.features.patchscopes import feature_patchscope as feature_patchscope
    from hookbook.recipes.features.reading import FeatureActivations as FeatureActivations
    from hookbook.recipes.features.reading import feature_activations as feature_activations
    from hookbook.recipes.features.sae_report import SAEReport as SAEReport
    from hookbook.recipes.features.sae_report import sae_report as sae_report
    from hookbook.recipes.features.steering import steer_feature as steer_feature
    from hookbook.recipes.hops.backpatching import Backpatch as Backpatch
    from hookbook.recipes.hops.backpatching import backpatch as backpatch
    from hookbook.recipes.hops.hop_knock_out import HopKnockOut as HopKnockOut
    from hookbook.recipes.hops.hop_knock_out import hop_knock_out as hop_knock_out
    from hookbook.recipes.hops.hop_readability import HopReadability as HopReadability
    from hookbook.recipes.hops.hop_readability import hop_readability as hop_readability
    from hookbook.recipes.hops.two_hops import TwoHops as TwoHops
    from hookbook.recipes.hops.two_hops import two_hops as two_hops
    from hookbook.recipes.reading.jacobians import jacobian as jacobian
    from hookbook.recipes.reading.logit_lens import LogitLens as LogitLens
    from hookbook.recipes.reading.logit_lens import logit_lens as logit_lens
    from hookbook.recipes.reading.patchscopes import Patchscope as Patchscope
    from hookbook.recipes.reading.patchscopes import patchscope as patchscope
    from hookbook.recipes.relations.linear_relations import LinearRelation as LinearRelation
    from hookbook.recipes.relations.linear_relations import attribute_lens as attribute_lens
    from hookbook.recipes.relations.linear_relations import linear_relation as linear_relation
    from hookbook.recipes.relations.relation_edits import RelationEdits as RelationEdits
    from hookbook.recipes.relations.relation_edits import change_answer as change_answer
    from hookbook.recipes.relations.relation_edits import edit_relation as edit_relation
    from hookbook.recipes.relations.relation_features import RelationFeatures as RelationFeatures
    from hookbook.recipes.relations.relation_features import relation_features as relation_features
    from hookbook.recipes.steering.contrast_vectors import ContrastVectors as ContrastVectors
    from hookbook.recipes.steering.contrast_vectors import contrast_vector as contrast_vector
    from hookbook.recipes.steering.generation import Generation as Generation
    from hookbook.recipes.steering.generation import generate as generate
    from hookbook.recipes.steering.in_context_shift import InContextVectors as InContextVectors
    from hookbook.recipes.steering.in_context_shift import in_context_vector as in_context_vector
    from hookbook.recipes.steering.refusal_direction import DirectionChoice as DirectionChoice
    from hookbook.recipes.steering.refusal_direction import directional_ablation as directional_ablation
    from hookbook.recipes.steering.refusal_direction import select_direction as select_direction
    from hookbook.recipes.steering.steering import Steering as Steering
    from hookbook.recipes.steering.steering import steer as steer
    from hookbook.recipes.steering.weights import orthogonalize as orthogonalize
    from hookbook.recipes.vectors.function_vectors import FunctionVectors as FunctionVectors
    from hookbook.recipes.vectors.function_vectors import HeadEffects as HeadEffects
    from hookbook.recipes.vectors.function_vectors import function_vector as function_vector
    from hookbook.recipes.vectors.function_vectors import head_effects as head_effects
    from hookbook.recipes.vectors.task_vectors import Composition as Composition
    from hookbook.recipes.vectors.task_vectors import TaskVectors as TaskVectors
    from hookbook.recipes.vectors.task_vectors import compose as compose
    from hookbook.recipes.vectors.task_vectors import known as known
    from hookbook.recipes.vectors.task_vectors import task_vector as task_vector
    from hookbook.relations import Relation as Relation
    from hookbook.remote.service import Handle as Handle
    from hookbook.remote.service import job as job
    from hookbook.request import Edit as Edit
    from hookbook.request import Sampling as Sampling
    from hookbook.sites import Site as Site
    from hookbook.tasks import Task as Task
    from hookbook.tokens import At as At
    from hookbook.vectors import Vector as Vector


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"hookbook.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"hookbook.{name}")
    elif name == "__version__":
        value = import_module("importlib.metadata").version("hookbook")
    else:
        raise AttributeError(f"module 'hookbook' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
