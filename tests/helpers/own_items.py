"""A few items of our own in the schemas of the short tasks' data sets and of NoLiMa's files."""

from __future__ import annotations

import json
from pathlib import Path

SHORT = {
    "mmlu/anatomy": {
        "dev": [
            {
                "question": f"How many thumbs are on {n} hands?",
                "subject": "anatomy",
                "choices": ["1", "2", "3", "4"],
                "answer": n - 1,
            }
            for n in (1, 2, 3, 4, 1)
        ],
        "test": [
            {
                "question": "Where is the heart?",
                "subject": "anatomy",
                "choices": ["chest", "foot", "ear", "hand"],
                "answer": 0,
            },
            {
                "question": "What do lungs take in?",
                "subject": "anatomy",
                "choices": ["sand", "air", "iron", "glass"],
                "answer": 1,
            },
        ],
    },
    "arc_challenge": {
        "test": [
            {
                "id": f"own_{i}",
                "question": question,
                "choices": {"text": ["ice", "steam", "sand"], "label": ["A", "B", "C"]},
                "answerKey": key,
            }
            for i, (question, key) in enumerate(
                [("What is frozen water?", "A"), ("What rises from boiling water?", "B")]
            )
        ]
    },
    "hellaswag": {
        "validation": [
            {
                "ind": 1,
                "activity_label": "Cooking",
                "ctx_a": "A man puts a pot on the stove.",
                "ctx_b": "he",
                "ctx": "A man puts a pot on the stove. he",
                "endings": ["boils water.", "flies away.", "reads the roof.", "paints the river."],
                "source_id": "own~1",
                "split": "val",
                "split_type": "indomain",
                "label": "0",
            }
        ]
    },
    "winogrande": {
        "validation": [
            {
                "sentence": "The cup did not fit into the box, _ was too big.",
                "option1": "the cup",
                "option2": "the box",
                "answer": "1",
            }
        ]
    },
    "piqa": {"validation": [{"goal": "To dry hands,", "sol1": "use a towel", "sol2": "use a lake", "label": 0}]},
    "gsm8k": {
        "train": [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(6)],
        "test": [{"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"}],
    },
}

NEEDLES = [
    {
        "id": "0001",
        "system_prompt": "",
        "needle": "Actually, {CHAR} keeps the keys of the {1}.",
        "questions": {"onehop": "Who can open the {1}?", "twohop": "Who could let a guest into the house of the {2}?"},
        "tests": {"T1": {"input_args": ["lighthouse", "lamp"]}, "T2": {"input_args": ["chapel", "bell"]}},
        "character_set": ["Ines", "Tomas", "Yara"],
    },
    {
        "id": "0002",
        "system_prompt": "",
        "needle": "The boat in the harbour is painted {1}.",
        "questions": {"onehop": "Which colour is the vessel?"},
        "tests": {"T1": {"input_args": ["teal"], "gold_answers": ["teal", "Teal"]}},
        "distractors": {"onehop": "Nobody has ever painted the {1} house."},
        "task_template": "{haystack}\n\n{question}\n",
    },
]


def write_short(folder: Path, names: list[str] | None = None) -> Path:
    for name, splits in SHORT.items():
        if names is None or name.split("/")[0] in names:
            where = folder / name
            where.mkdir(parents=True)
            for split, rows in splits.items():
                (where / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_nolima(folder: Path, words: int = 3000) -> tuple[Path, Path]:
    """(needle set, folder with two books)."""
    books = folder / "books"
    books.mkdir(parents=True)
    for number in (1, 2):
        lines = [" ".join(f"word{(i * 7 + j * 3 + number) % 97}" for j in range(12)) + "." for i in range(words // 12)]
        (books / f"book_{number}.txt").write_text("\n".join(lines) + "\n")
    needles = folder / "needles.json"
    needles.write_text(json.dumps(NEEDLES))
    return needles, books
