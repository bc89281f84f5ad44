"""Names of the conformance files: tiny random models, with logits that llama.cpp computed in float32."""

NAMES = (
    "afmoe-moe", "baichuan-dense", "bailingmoe-moe", "bailingmoe2-moe", "bailingmoe3-moe", "bloom-dense",
    "cohere2-dense", "cohere2moe-moe", "command-r-dense", "dbrx-moe", "deci-dense", "deepseek-moe", "deepseek2-moe",
    "deepseek32-moe", "ernie4_5-moe", "ernie4_5-moe-moe", "exaone-moe-moe", "exaone4-dense", "falcon-dense",
    "falcon-h1-dense", "gemma-dense", "gemma2-dense", "gemma3-dense", "glm4-dense", "glm4moe-moe", "gpt-oss-moe",
    "gpt2-dense", "gptneox-dense", "granite-dense", "granite-moe", "granite_swa-dense", "granitehybrid-dense",
    "grok-moe", "hunyuan-dense-dense", "hunyuan_vl-dense", "hy_v3-moe", "internlm2-dense", "jamba-dense",
    "kimi-k3-moe", "kimi-linear-moe", "laguna-moe", "lfm2-dense", "lfm2moe-moe", "llama-dense", "llama-moe",
    "llama4-moe", "mamba-dense", "mamba2-dense", "mimo2-moe", "minicpm-dense", "minicpm3-dense", "minimax-01-moe",
    "minimax-m2-moe", "minimax-m3-moe", "mistral3-dense", "mistral4-moe", "mpt-dense", "nemotron-dense",
    "nemotron_h-dense", "nemotron_h_moe-dense", "olmo-dense", "olmo2-dense", "olmoe-moe", "phi2-dense",
    "phi3-dense", "phimoe-moe", "plamo2-dense", "plamo3-dense", "qwen-dense", "qwen2-dense", "qwen2moe-moe",
    "qwen3-dense", "qwen35-dense", "qwen35moe-moe", "qwen3moe-moe", "qwen3next-moe", "qwen4exp-moe",
    "seed_oss-dense", "smallthinker-moe", "smollm3-dense", "stablelm-dense", "starcoder2-dense",
)  # fmt: skip
"""Files of conformance/ and conformance2/ whose families are supported."""

SAME_AS = {
    "apertus", "arcee", "arctic", "arwkv7", "bitnet", "chameleon", "chatglm", "codeshell", "cogvlm",
    "deepseek2-ocr", "deepseek4", "dots1", "dots3note", "exaone", "gemma3n", "gemma4", "glm-dsa", "glm5-next",
    "granitemoe", "grovemoe", "hrm_text", "hunyuan-moe", "hy_v4", "jais", "jais2", "maincoder", "maple", "mellum",
    "muse-glimmer", "nanbeige", "openelm", "orion", "paddleocr", "pangu-embedded", "plamo", "plm", "qwen2vl", "qwen3vl",
    "qwen3vlmoe", "refact", "rwkv6", "rwkv6qwen2", "rwkv7", "spark2_5", "starcoder", "step35", "talkie", "xverse",
}  # fmt: skip
"""Families without a conformance file, of which test_peer_logits.py has references."""

BY_FORMULA = {"gptj"}
"""Families that no other program at hand runs: test_features.py has their formula."""

ENCODERS = {
    "bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llama-embed", "modern-bert", "neo-bert",
    "nomic-bert", "nomic-bert-moe", "t5", "t5encoder",
}  # fmt: skip
"""Families that give vectors and no logits; tests/model/test_peer_embeddings.py has references."""


def error(found, expected):
    return float(((found - expected) ** 2).mean() / (expected**2).mean())
