"""A compiled model behind HTTP: feature maps come in as blobs, the outputs go back.

``actzip.serve("tail.actzip", port=8000)``, or ``actzip serve tail.actzip --port 8000``, serves the
file that ``CompiledModel.save`` wrote; :class:`Client` asks it. FastAPI and uvicorn do the HTTP
(``pip install actzip[serve]``); the model runs in processes of its own, which are started anew when
they die. See ``docs/serving.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip._module import lazy, make_callable
from actzip.serve.client import Client
from actzip.serve.run import serve
from actzip.serve.settings import Settings

__all__ = ["Client", "Settings", "serve"]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__)

make_callable(__name__, "serve")
