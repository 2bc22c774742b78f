"""Models as plain PyTorch: configuration, decoder, mixers, generation. No ranks in here."""

from rondo.models import ffn, mixers  # noqa: F401  (they fill the registries)
from rondo.models.config import ModelConfig, from_preset, preset_names
from rondo.models.decoder import Decoder, DecoderState, Output
from rondo.models.generate import generate
from rondo.models.loading import load
from rondo.models.mixer import Cost, Mixer, SequenceContext
from rondo.models.registry import FFNS, MIXERS, ROUTERS

__all__ = [
    "FFNS",
    "MIXERS",
    "ROUTERS",
    "Cost",
    "Decoder",
    "DecoderState",
    "Mixer",
    "ModelConfig",
    "Output",
    "SequenceContext",
    "from_preset",
    "generate",
    "load",
    "preset_names",
]
