"""Public datasets, one small module each: its schema and a pure converter from a raw row to our record."""

from smolkit.sources import (
    alpaca_cleaned,
    fineweb,
    glaive_toolcall,
    gsm8k,
    hermes_function_calling,
    industry_corpus2,
    infinity_instruct,
    infinity_preference,
    openai_tools,
    openo1_sft,
    smol_smoltalk,
    smollm_corpus,
    smoltalk,
    tiny_stories,
    trl_ultrafeedback,
    ultrachat_200k,
    ultrafeedback,
    ultrafeedback_binarized,
)
from smolkit.sources.base import Source

ALL: tuple[Source, ...] = (
    industry_corpus2.SOURCE,
    fineweb.SOURCE,
    smollm_corpus.SOURCE,
    tiny_stories.SOURCE,
    smol_smoltalk.SOURCE,
    smoltalk.SOURCE,
    openo1_sft.SOURCE,
    alpaca_cleaned.SOURCE,
    ultrachat_200k.SOURCE,
    infinity_instruct.SOURCE,
    gsm8k.SOURCE,
    hermes_function_calling.SOURCE,
    *glaive_toolcall.SOURCES,
    openai_tools.SOURCE,
    ultrafeedback.SOURCE,
    ultrafeedback_binarized.SOURCE,
    trl_ultrafeedback.SOURCE,
    infinity_preference.SOURCE,
)
