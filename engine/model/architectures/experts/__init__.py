"""Families that are, or became, mixtures of experts."""

from engine.model.architectures.experts import (
    afmoe,
    arctic,
    dbrx,
    ernie,
    gpt_oss,
    grok,
    grovemoe,
    mellum,
    mimo,
    smallthinker,
    step,
)

FILES = (
    afmoe,
    arctic,
    dbrx,
    ernie,
    gpt_oss,
    grok,
    grovemoe,
    mellum,
    mimo,
    smallthinker,
    step,
)
