"""Core attention for packed documents, exact under context parallelism.

`supported` and this package itself need the standard library only; the rest is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .boundaries import DocumentBoundaries, document_boundaries
    from .document_attention import DocumentAttention
    from .supported import check_supported

__all__ = ["DocumentAttention", "DocumentBoundaries", "check_supported", "document_boundaries"]

_WHERE = {
    "DocumentAttention": "document_attention",
    "DocumentBoundaries": "boundaries",
    "check_supported": "supported",
    "document_boundaries": "boundaries",
}


def __getattr__(name: str) -> Any:
    """A public name from its module; nothing that needs torch or megatron.core is imported before it is asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
