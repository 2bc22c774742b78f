"""Channel mixers."""

from rondo.models.ffn import routers  # noqa: F401  (they fill their registry)
from rondo.models.ffn.moe import MoE
from rondo.models.ffn.swiglu import SwiGLU

__all__ = ["MoE", "SwiGLU"]
