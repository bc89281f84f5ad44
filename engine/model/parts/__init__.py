"""Parts of model families, as the declarations in engine/model/architectures/ name them. Data only.

One class per part of the model. A default is what a plain model does, so a declaration names only what is different.
"Is read" says that the family takes the metadata key of that name; a family that does not read a key which changes the
computation refuses files that hold it.
"""

from engine.model.parts.attention import AttentionParts, IndexerParts, QkNormParts, TemperatureParts, WindowParts
from engine.model.parts.ffn import FfnParts, MoeParts
from engine.model.parts.layer import LayerParts, Parallel
from engine.model.parts.model import BiasParts, EmbeddingParts, HeadParts, LogitScale, NormParts, RankParts
from engine.model.parts.presence import Presence
from engine.model.parts.recurrent import Placement, Recurrence, RecurrentParts
from engine.model.parts.rope import RopeParts

__all__ = [
    "AttentionParts",
    "BiasParts",
    "EmbeddingParts",
    "FfnParts",
    "HeadParts",
    "IndexerParts",
    "LayerParts",
    "LogitScale",
    "MoeParts",
    "NormParts",
    "Parallel",
    "Placement",
    "Presence",
    "QkNormParts",
    "RankParts",
    "Recurrence",
    "RecurrentParts",
    "RopeParts",
    "TemperatureParts",
    "WindowParts",
]
