"""NDIF's own settings. anyio comes before nnsight, which puts `save` on `object`, and which anyio then takes for a field."""

import anyio._backends._asyncio  # noqa: F401, I001
from ndif.services.api.gunicorn_conf import *  # noqa: F403
