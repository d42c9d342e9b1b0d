"""Makes the models beside it and ids.json, what sentencepiece itself gives (pip install sentencepiece==0.2.3)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import sentencepiece

WORDS = (  # noqa: SIM905
    "pick up the red cube place it on blue plate close drawer of table open top bottom left right robot gripper take "
    "action what should to in out state task stack move near far put spoon pot sink carrot bowl black white cabinet "
    "lift turn stove in: out: task: ?"
).split()
TEXTS = [
    "In: What action should the robot take to pick up the red cube?\nOut:",
    "Task: stack the blocks, State: 224 250 -1 4 86;\nAction: ",
    "  two  blanks ",
    "",
    " ",
    "naïve café ½ 机器人 \U0001f600",
    "\n\nline\n",
    "PUT the Zebra",
    "close drawer ",
    "a    b <mask> c",
    "Task: x,   State",
]
BPE = {
    "vocab_size": 600,
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.9999,
}
MODELS = {
    "llama": BPE | {"add_dummy_prefix": True},
    "gemma": BPE
    | {"add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    | {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
    | {"user_defined_symbols": ["\n", "\n\n", "▁▁", "▁▁▁", "<mask>"]},
    "unigram": {
        "vocab_size": 300,
        "model_type": "unigram",
        "normalization_rule_tsv": "rules.tsv",
        "character_coverage": 1.0,
    },
}


def main() -> None:
    random.seed(0)
    lines = [" ".join(random.choices(WORDS, k=random.randint(3, 12))) + random.choice("?.;") for _ in range(3000)]
    lines += [f"In: What action should the robot take to {line}?" for line in lines[:300]]
    lines += [
        f"Task: {line}, State: {' '.join(str(random.randint(0, 255)) for _ in range(7))};" for line in lines[:400]
    ]
    Path("corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    Path("rules.tsv").write_text("00E9\t65\nFB01\t66 69\n00BD\t31 2F 32\n", encoding="utf-8")
    ids = {}
    for name, settings in MODELS.items():
        sentencepiece.SentencePieceTrainer.train(
            input="corpus.txt", model_prefix=name, num_threads=1, hard_vocab_limit=False, **settings
        )
        processor = sentencepiece.SentencePieceProcessor(model_file=f"{name}.model")
        ids[name] = [processor.encode(text) for text in TEXTS]
    Path("ids.json").write_text(json.dumps({"texts": TEXTS, "ids": ids}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
