"""GPU-hours that SePO's paper published (arXiv 2408.13518, EMNLP 2025).

Table 1: one epoch of alignment on UltraFeedback's 61 135 pairs, 128 pairs a step. Table 5: what the
oracles took, an SFT of two epochs on UltraChat-200K's 207 865 dialogues (512 a step), then DPO on the
same pairs. The paper's setting for both: OpenRLHF, FlashAttention 2, bfloat16, all weights trained,
Adam, 4 A100 of 80 GB. It does not say which variant of TDPO it ran; tdpo1 stands for it.
"""

METHODS = "dpo", "ipo", "rrhf", "simpo", "tdpo1", "sparsepo", "sepo-rand", "sepo"


def _row(*hours: float) -> dict[str, float]:
    return dict(zip(METHODS, hours, strict=True))


TABLE_1 = {
    "Pythia-2.8B": _row(79.45, 75.9, 52.19, 49.31, 83.1, 49.3, 24.92, 29.84),
    "Pythia-6.9B": _row(190.9, 184.74, 141.27, 145.26, 209.93, 96.43, 77.35, 79.07),
    "LLaMA2-7B": _row(182.95, 170.3, 123.67, 119.84, 204.6, 85.0, 68.3, 71.97),
    "LLaMA2-13B": _row(319.67, 336.33, 269.61, 270.35, 297.43, 161.0, 140.57, 151.05),
    "LLaMA3-8B": _row(210.0, 215.73, 148.8, 128.1, 245.8, 94.0, 83.9, 84.5),
    "LLaMA3-8B-Instruct": _row(201.0, 212.46, 162.44, 136.9, 245.52, 96.4, 89.23, 84.36),
}
TABLE_5 = {  # SFT, DPO
    "Pythia-70M": (3.2, 0.93),
    "Pythia-160M": (6.63, 2.37),
    "Pythia-410M": (18.2, 7.41),
    "Pythia-1B": (32.01, 8.45),
    "Pythia-1.4B": (42.48, 11.0),
    "TinyLlama-1.1B": (33.71, 9.71),
}
DIALOGUES, SFT_EPOCHS = 207_865, 2
# alignment-handbook/zephyr-7b-sft-full on the Hugging Face hub: 1090 steps of 128 full blocks
DIALOGUE_TOKENS = 1090 * 128 * 2048 / DIALOGUES
