"""Families in which all or most layers have a state instead of attention."""

from engine.model.architectures.recurrent import falcon_h1, jamba, kimi, lfm, mamba, nemotron_h, rwkv

FILES = (
    falcon_h1,
    jamba,
    kimi,
    lfm,
    mamba,
    nemotron_h,
    rwkv,
)
