"""Public datasets, one small module each: its schema and a pure converter from a raw row to our record."""

from smolkit.sources import (
    gsm8k,
    industry_corpus2,
    infinity_instruct,
    infinity_preference,
    openo1_sft,
    smol_smoltalk,
    smoltalk,
    ultrafeedback,
    ultrafeedback_binarized,
)
from smolkit.sources.base import Source

_MODULES = (
    industry_corpus2,
    smol_smoltalk,
    smoltalk,
    openo1_sft,
    infinity_instruct,
    gsm8k,
    ultrafeedback,
    ultrafeedback_binarized,
    infinity_preference,
)
ALL: tuple[Source, ...] = tuple(module.SOURCE for module in _MODULES)
