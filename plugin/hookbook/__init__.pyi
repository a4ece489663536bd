# Every public name, and where it lives: `__init__.py` reads this file, and nothing else lists them.

from . import (
    errors as errors,
    hops as hops,
    interop as interop,
    prompts as prompts,
    relations as relations,
    request as request,
    results as results,
    sae as sae,
    scores as scores,
    sites as sites,
    tasks as tasks,
    testing as testing,
    tokens as tokens,
)
from .adapter import Adapter as Adapter, ModelCard as ModelCard
from .engine.cost import Plan as Plan
from .errors import HookbookError as HookbookError
from .maps import Affine as Affine
from .models.loading import load as load, wrap as wrap
from .recipes.features.attribution import FeatureAttribution as FeatureAttribution, feature_attribution as feature_attribution
from .recipes.features.backpatching import FeatureBackpatch as FeatureBackpatch, backpatch_features as backpatch_features
from .recipes.features.decomposition import FeatureVector as FeatureVector
from .recipes.features.effects import FeatureSweep as FeatureSweep, feature_sweep as feature_sweep
from .recipes.features.examples import FeatureExamples as FeatureExamples, feature_examples as feature_examples
from .recipes.features.patchscopes import FeaturePatchscope as FeaturePatchscope, feature_patchscope as feature_patchscope
from .recipes.features.reading import FeatureActivations as FeatureActivations, feature_activations as feature_activations
from .recipes.features.sae_report import SAEReport as SAEReport, sae_report as sae_report
from .recipes.features.sae_training import SAETraining as SAETraining
from .recipes.features.sparse_coding import SparseCoding as SparseCoding, sparse_coding as sparse_coding
from .recipes.features.steering import steer_feature as steer_feature
from .recipes.hops.backpatching import Backpatch as Backpatch, backpatch as backpatch
from .recipes.hops.hop_knock_out import HopKnockOut as HopKnockOut, hop_knock_out as hop_knock_out
from .recipes.hops.hop_readability import HopReadability as HopReadability, hop_readability as hop_readability
from .recipes.hops.two_hops import TwoHops as TwoHops, two_hops as two_hops
from .recipes.neurons.attribution import NeuronAttribution as NeuronAttribution, neuron_attribution as neuron_attribution
from .recipes.neurons.cumulative import CumulativeAblation as CumulativeAblation, cumulative_ablation as cumulative_ablation
from .recipes.neurons.knowledge import KnowledgeNeurons as KnowledgeNeurons, knowledge_neurons as knowledge_neurons
from .recipes.neurons.memories import MLPMemories as MLPMemories, mlp_memories as mlp_memories
from .recipes.neurons.neuron import neuron as neuron
from .recipes.neurons.report import NeuronReport as NeuronReport
from .recipes.neurons.search import NeuronSearch as NeuronSearch, find_neurons as find_neurons
from .recipes.neurons.sweep import NeuronSweep as NeuronSweep, neuron_sweep as neuron_sweep
from .recipes.reading.jacobians import Jacobian as Jacobian, jacobian as jacobian
from .recipes.reading.logit_lens import LogitLens as LogitLens, logit_lens as logit_lens
from .recipes.reading.patchscopes import Patchscope as Patchscope, patchscope as patchscope
from .recipes.relations.attribute_lens import attribute_lens as attribute_lens
from .recipes.relations.linear_relations import (
    LinearRelation as LinearRelation,
    change_answer as change_answer,
    linear_relation as linear_relation,
)
from .recipes.relations.relation_edits import RelationEdits as RelationEdits, edit_relation as edit_relation
from .recipes.relations.relation_features import RelationFeatures as RelationFeatures, relation_features as relation_features
from .recipes.steering.contrast_vectors import ContrastVectors as ContrastVectors, contrast_vector as contrast_vector
from .recipes.steering.generation import Generation as Generation, generate as generate
from .recipes.steering.in_context_shift import InContextVectors as InContextVectors, in_context_vector as in_context_vector
from .recipes.steering.refusal_direction import (
    DirectionChoice as DirectionChoice,
    directional_ablation as directional_ablation,
    select_direction as select_direction,
)
from .recipes.steering.steering import Steering as Steering, steer as steer
from .recipes.steering.weights import orthogonalize as orthogonalize
from .recipes.vectors.function_vectors import (
    FunctionVectors as FunctionVectors,
    HeadEffects as HeadEffects,
    function_vector as function_vector,
    head_effects as head_effects,
)
from .recipes.vectors.task_vectors import (
    Composition as Composition,
    TaskVectors as TaskVectors,
    compose as compose,
    known as known,
    task_vector as task_vector,
)
from .relations import Relation as Relation
from .remote.handles import Handle as Handle, job as job
from .request import Edit as Edit, Sampling as Sampling
from .sites import Site as Site
from .tasks import Task as Task
from .tokens import At as At
from .vectors import Vector as Vector

__version__: str
