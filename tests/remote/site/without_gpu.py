"""NDIF's own actors on a machine without a GPU; loaded through the settings that name the actors."""

import inspect
import time

import ray
import torch
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.deployments.modeling import base
from ndif.services.ray.sandbox import host
from ndif.services.ray.sandbox.model import SandboxHost
from nnsight.modeling.mixins.remotable import Remotable


def _without_trust(name):
    """nnsight 0.8.1 has dropped an argument that ndif 0.1.2 still passes."""
    stock = getattr(Remotable, name).__func__
    if "trust_remote_code" not in inspect.signature(stock).parameters:
        setattr(Remotable, name, classmethod(lambda cls, *args, trust_remote_code=False, **kwargs: stock(cls, *args, **kwargs)))


for _name in ("describe_checkpoint", "max_tp_size"):
    _without_trust(_name)

if not torch.cuda.is_available():
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *args, **kwargs: None


class OnCPU(base.BaseModelDeployment):
    CACHEABLE = False

    def load_from_disk(self):
        start = time.time()
        model = base.HuggingFaceModel.from_model_key(self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs)
        model._module.requires_grad_(False)
        base.ModelLoadTimeMetric.update(model_key=self.model_key, duration_ms=base.elapsed_ms(start), load_type="initial", num_gpus=0)
        return model


@ray.remote(num_cpus=0.1, max_restarts=-1)
class ModelActor(OnCPU):
    pass


class Controller(_ControllerActor):
    """Not decorated: Ray sends a decorated class by value and its bases by name, which is what imports this module."""


@ray.remote(num_cpus=0.1, num_gpus=0, max_restarts=0, resources={"head": 1})
class ControllerActor(Controller):
    pass


# a sandbox starts with few of the environment's variables; these lead it to the local hub
host.RUNNER_ENV = (*host.RUNNER_ENV, "HF_ENDPOINT", "HF_HOME", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET", "PYTHONPATH", "NDIF_HOST")


class Sandboxed(SandboxHost, OnCPU):
    """Every job runs as that of a key that is not trusted."""

    def __init__(self, *args, pool_size=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.open_pool(pool_size or 1)

    async def run(self, request):
        request.trusted = False
        await super().run(request)

    def execute(self, request):
        return self.run_in_runner(request, None)

    def interrupt(self):
        if self.execution_sandbox is not None:
            self.execution_sandbox.stop()
        super().interrupt()


@ray.remote(num_cpus=0.1, max_restarts=-1)
class SandboxActor(Sandboxed):
    pass
