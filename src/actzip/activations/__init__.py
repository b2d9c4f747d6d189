"""How activation maps are found, watched and changed, in any ``nn.Module``, without touching its code.

A :class:`ActivationTap` puts a torch function mode around the model's forward pass. It therefore sees every
call, whether it comes from a module (``nn.ReLU``), a function (``F.relu``, ``torch.clamp``) or a
method, in place or not, and can put another tensor in the place of its result. The model's class,
``state_dict`` and code stay as they are. Everything else of the project (penalties, thresholds,
quantizers, the profiler) stands on this.

Names of sites
    A site is one activation (or one convolution or linear) call of a forward pass. Its name is the
    path of the innermost module that runs it, as in ``named_modules()``; later calls of the same
    kind inside the same module in the same pass get ``:1``, ``:2`` ... So ``nn.ReLU`` called
    ``layer1.0.relu`` twice gives ``layer1.0.relu`` and ``layer1.0.relu:1``; a functional ``F.relu``
    in ``Conv2d_1a_3x3`` gives that name. Calls in the root module itself are named ``(model)``.
    Activations and computations are counted apart.

Choosing sites
    ``layers`` and ``ignore`` take any mix of: an exact name, a glob (``layer1.*``), a regular
    expression (``re:...``, full match), a module type (``nn.ReLU``, matched against the innermost
    module) or its class name (``type:ReLU``). ``ignore`` wins. A plain name that no site has raises
    :class:`~actzip.errors.LayerError` with near matches.
"""

from __future__ import annotations

from actzip.activations.macs import count_macs, output_size
from actzip.activations.sites import ROOT, ComputeCall, Selector, Site, select_sites
from actzip.activations.tap import (
    ActivationFn,
    ActivationTap,
    ComputeFn,
    call_model,
    eval_mode,
    find_sites,
    run_model,
)
from actzip.activations.thresholds import (
    clear_thresholds,
    get_thresholds,
    load_thresholds,
    set_thresholds,
    threshold_activation,
    without_thresholds,
)

# under these names they lie in pickles of models with thresholds
from actzip.activations.tap import _Watched as _Watched  # isort: skip
from actzip.activations.thresholds import _Thresholds as _Thresholds  # isort: skip

__all__ = [
    "ROOT",
    "ActivationFn",
    "ActivationTap",
    "ComputeCall",
    "ComputeFn",
    "Selector",
    "Site",
    "call_model",
    "clear_thresholds",
    "count_macs",
    "eval_mode",
    "find_sites",
    "get_thresholds",
    "load_thresholds",
    "output_size",
    "run_model",
    "select_sites",
    "set_thresholds",
    "threshold_activation",
    "without_thresholds",
]
