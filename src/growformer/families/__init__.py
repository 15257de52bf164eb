"""Model families, one literal each, and which becomes which."""

from growformer.algebra import Family
from growformer.families.bart import BART
from growformer.families.bert import BERT
from growformer.families.bloom import BLOOM
from growformer.families.clip import CLIP
from growformer.families.clip_text_model import CLIP_TEXT_MODEL
from growformer.families.clip_vision_model import CLIP_VISION_MODEL
from growformer.families.cohere import COHERE
from growformer.families.cohere2 import COHERE2
from growformer.families.deberta_v2 import DEBERTA_V2
from growformer.families.deepseek_v3 import DEEPSEEK_V3
from growformer.families.deit import DEIT
from growformer.families.dinov2 import DINOV2
from growformer.families.distilbert import DISTILBERT
from growformer.families.electra import ELECTRA
from growformer.families.falcon import FALCON
from growformer.families.gemma import GEMMA
from growformer.families.gemma2 import GEMMA2
from growformer.families.gemma3_text import GEMMA3_TEXT
from growformer.families.gemma4_text import GEMMA4_TEXT
from growformer.families.glm4 import GLM4
from growformer.families.gpt2 import GPT2
from growformer.families.gpt_neo import GPT_NEO
from growformer.families.gpt_neox import GPT_NEOX
from growformer.families.gpt_oss import GPT_OSS
from growformer.families.gptj import GPTJ
from growformer.families.granite import GRANITE
from growformer.families.llama import LLAMA
from growformer.families.mistral import MISTRAL
from growformer.families.mixtral import MIXTRAL
from growformer.families.modernbert import MODERNBERT
from growformer.families.mpt import MPT
from growformer.families.nemotron import NEMOTRON
from growformer.families.olmo import OLMO
from growformer.families.olmo2 import OLMO2
from growformer.families.olmo3 import OLMO3
from growformer.families.opt import OPT
from growformer.families.phi import PHI
from growformer.families.phi3 import PHI3
from growformer.families.qwen2 import QWEN2
from growformer.families.qwen2_moe import QWEN2_MOE
from growformer.families.qwen3 import QWEN3
from growformer.families.qwen3_moe import QWEN3_MOE
from growformer.families.roberta import ROBERTA
from growformer.families.siglip import SIGLIP
from growformer.families.siglip_text_model import SIGLIP_TEXT_MODEL
from growformer.families.siglip_vision_model import SIGLIP_VISION_MODEL
from growformer.families.smollm3 import SMOLLM3
from growformer.families.stablelm import STABLELM
from growformer.families.starcoder2 import STARCODER2
from growformer.families.t5 import T5
from growformer.families.tokenformer import TOKENFORMER
from growformer.families.umt5 import UMT5
from growformer.families.upcycling import BECOMING
from growformer.families.vit import VIT
from growformer.families.whisper import WHISPER

_ALL = (
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    GEMMA,
    GEMMA2,
    GEMMA3_TEXT,
    GEMMA4_TEXT,
    PHI,
    PHI3,
    OLMO,
    OLMO2,
    OLMO3,
    GRANITE,
    COHERE,
    COHERE2,
    FALCON,
    GPT2,
    GPT_NEO,
    GPT_NEOX,
    GPTJ,
    OPT,
    BLOOM,
    MPT,
    STABLELM,
    STARCODER2,
    SMOLLM3,
    NEMOTRON,
    GPT_OSS,
    DEEPSEEK_V3,
    GLM4,
    BERT,
    ROBERTA,
    DISTILBERT,
    ELECTRA,
    MODERNBERT,
    DEBERTA_V2,
    VIT,
    DEIT,
    DINOV2,
    CLIP,
    CLIP_TEXT_MODEL,
    CLIP_VISION_MODEL,
    SIGLIP,
    SIGLIP_TEXT_MODEL,
    SIGLIP_VISION_MODEL,
    WHISPER,
    BART,
    T5,
    UMT5,
    TOKENFORMER,
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
"""Every family by name."""

__all__ = ["BECOMING", "FAMILIES"]
