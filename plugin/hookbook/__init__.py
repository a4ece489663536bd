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
    "ContrastVectors": "recipes.contrast_vectors",
    "DirectionChoice": "recipes.refusal_direction",
    "InContextVectors": "recipes.in_context_shift",
    "Steering": "recipes.steering",
    "contrast_vector": "recipes.contrast_vectors",
    "directional_ablation": "recipes.refusal_direction",
    "in_context_vector": "recipes.in_context_shift",
    "orthogonalize": "recipes.weights",
    "select_direction": "recipes.refusal_direction",
    "steer": "recipes.steering",
    "steer_feature": "recipes.feature_steering",
    "FeatureAttribution": "recipes.feature_attribution",
    "FeatureBackpatch": "recipes.feature_backpatching",
    "FeatureSweep": "recipes.feature_effects",
    "backpatch_features": "recipes.feature_backpatching",
    "feature_attribution": "recipes.feature_attribution",
    "feature_sweep": "recipes.feature_effects",
    "Affine": "maps",
    "At": "tokens",
    "Edit": "request",
    "Relation": "relations",
    "Task": "tasks",
    "Backpatch": "recipes.backpatching",
    "HopKnockOut": "recipes.hop_knock_out",
    "HopReadability": "recipes.hop_readability",
    "TwoHops": "recipes.two_hops",
    "hop_knock_out": "recipes.hop_knock_out",
    "hop_readability": "recipes.hop_readability",
    "two_hops": "recipes.two_hops",
    "Composition": "recipes.task_vectors",
    "FeatureActivations": "recipes.feature_reading",
    "FeatureExamples": "recipes.feature_examples",
    "FeaturePatchscope": "recipes.feature_patchscopes",
    "FeatureVector": "recipes.feature_decomposition",
    "RelationFeatures": "recipes.relation_features",
    "feature_patchscope": "recipes.feature_patchscopes",
    "relation_features": "recipes.relation_features",
    "FunctionVectors": "recipes.function_vectors",
    "HeadEffects": "recipes.function_vectors",
    "TaskVectors": "recipes.task_vectors",
    "Vector": "vectors",
    "backpatch": "recipes.backpatching",
    "compose": "recipes.task_vectors",
    "feature_activations": "recipes.feature_reading",
    "feature_examples": "recipes.feature_examples",
    "function_vector": "recipes.function_vectors",
    "head_effects": "recipes.function_vectors",
    "known": "recipes.task_vectors",
    "task_vector": "recipes.task_vectors",
    "Generation": "recipes.generation",
    "LinearRelation": "recipes.linear_relations",
    "RelationEdits": "recipes.relation_edits",
    "attribute_lens": "recipes.linear_relations",
    "change_answer": "recipes.relation_edits",
    "edit_relation": "recipes.relation_edits",
    "linear_relation": "recipes.linear_relations",
    "HookbookError": "errors",
    "LogitLens": "recipes.logit_lens",
    "ModelCard": "adapter",
    "Patchscope": "recipes.patchscopes",
    "Plan": "planning",
    "SAEReport": "recipes.sae_report",
    "Sampling": "request",
    "Site": "sites",
    "Handle": "jobs",
    "generate": "recipes.generation",
    "job": "jobs",
    "jacobian": "gradients",
    "load": "loading",
    "logit_lens": "recipes.logit_lens",
    "patchscope": "recipes.patchscopes",
    "sae_report": "recipes.sae_report",
    "wrap": "loading",
}
_MODULES = (
    "adapters",
    "doctor",
    "errors",
    "hops",
    "interop",
    "packages",
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
    from hookbook.errors import HookbookError as HookbookError
    from hookbook.gradients import jacobian as jacobian
    from hookbook.jobs import Handle as Handle
    from hookbook.jobs import job as job
    from hookbook.loading import load as load
    from hookbook.loading import wrap as wrap
    from hookbook.maps import Affine as Affine
    from hookbook.planning import Plan as Plan
    from hookbook.recipes.backpatching import Backpatch as Backpatch
    from hookbook.recipes.backpatching import backpatch as backpatch
    from hookbook.recipes.contrast_vectors import ContrastVectors as ContrastVectors
    from hookbook.recipes.contrast_vectors import contrast_vector as contrast_vector
    from hookbook.recipes.feature_attribution import FeatureAttribution as FeatureAttribution
    from hookbook.recipes.feature_attribution import feature_attribution as feature_attribution
    from hookbook.recipes.feature_backpatching import FeatureBackpatch as FeatureBackpatch
    from hookbook.recipes.feature_backpatching import backpatch_features as backpatch_features
    from hookbook.recipes.feature_decomposition import FeatureVector as FeatureVector
    from hookbook.recipes.feature_effects import FeatureSweep as FeatureSweep
    from hookbook.recipes.feature_effects import feature_sweep as feature_sweep
    from hookbook.recipes.feature_examples import FeatureExamples as FeatureExamples
    from hookbook.recipes.feature_examples import feature_examples as feature_examples
    from hookbook.recipes.feature_patchscopes import FeaturePatchscope as FeaturePatchscope
    from hookbook.recipes.feature_patchscopes import feature_patchscope as feature_patchscope
    from hookbook.recipes.feature_reading import FeatureActivations as FeatureActivations
    from hookbook.recipes.feature_reading import feature_activations as feature_activations
    from hookbook.recipes.feature_steering import steer_feature as steer_feature
    from hookbook.recipes.function_vectors import FunctionVectors as FunctionVectors
    from hookbook.recipes.function_vectors import HeadEffects as HeadEffects
    from hookbook.recipes.function_vectors import function_vector as function_vector
    from hookbook.recipes.function_vectors import head_effects as head_effects
    from hookbook.recipes.generation import Generation as Generation
    from hookbook.recipes.generation import generate as generate
    from hookbook.recipes.hop_knock_out import HopKnockOut as HopKnockOut
    from hookbook.recipes.hop_knock_out import hop_knock_out as hop_knock_out
    from hookbook.recipes.hop_readability import HopReadability as HopReadability
    from hookbook.recipes.hop_readability import hop_readability as hop_readability
    from hookbook.recipes.in_context_shift import InContextVectors as InContextVectors
    from hookbook.recipes.in_context_shift import in_context_vector as in_context_vector
    from hookbook.recipes.linear_relations import LinearRelation as LinearRelation
    from hookbook.recipes.linear_relations import attribute_lens as attribute_lens
    from hookbook.recipes.linear_relations import linear_relation as linear_relation
    from hookbook.recipes.logit_lens import LogitLens as LogitLens
    from hookbook.recipes.logit_lens import logit_lens as logit_lens
    from hookbook.recipes.patchscopes import Patchscope as Patchscope
    from hookbook.recipes.patchscopes import patchscope as patchscope
    from hookbook.recipes.refusal_direction import DirectionChoice as DirectionChoice
    from hookbook.recipes.refusal_direction import directional_ablation as directional_ablation
    from hookbook.recipes.refusal_direction import select_direction as select_direction
    from hookbook.recipes.relation_edits import RelationEdits as RelationEdits
    from hookbook.recipes.relation_edits import change_answer as change_answer
    from hookbook.recipes.relation_edits import edit_relation as edit_relation
    from hookbook.recipes.relation_features import RelationFeatures as RelationFeatures
    from hookbook.recipes.relation_features import relation_features as relation_features
    from hookbook.recipes.sae_report import SAEReport as SAEReport
    from hookbook.recipes.sae_report import sae_report as sae_report
    from hookbook.recipes.steering import Steering as Steering
    from hookbook.recipes.steering import steer as steer
    from hookbook.recipes.task_vectors import Composition as Composition
    from hookbook.recipes.task_vectors import TaskVectors as TaskVectors
    from hookbook.recipes.task_vectors import compose as compose
    from hookbook.recipes.task_vectors import known as known
    from hookbook.recipes.task_vectors import task_vector as task_vector
    from hookbook.recipes.two_hops import TwoHops as TwoHops
    from hookbook.recipes.two_hops import two_hops as two_hops
    from hookbook.recipes.weights import orthogonalize as orthogonalize
    from hookbook.relations import Relation as Relation
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
