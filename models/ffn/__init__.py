"""Channel mixers."""

from rondo.models.ffn.swiglu import SwiGLU

__all__ = ["SwiGLU"]
