"""Convert a random model of 289 MB in FOLDER both ways; prints the most private memory (RssAnon) that each way added, in bytes.

Private memory is what a conversion needs; pages of mapped files, which the kernel takes back when it wants them, are not in it.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import time
from pathlib import Path

import torch

from exact_megatron.convert.config_json import model_settings
from exact_megatron.convert.convert import hf_to_megatron, megatron_to_hf
from exact_megatron.convert.mapping import all_parts
from exact_megatron.convert.weights import SafetensorsWriter
from exact_megatron.training.schema import ModelConfig, RopeScalingConfig

CONFIG = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}


def write(folder: Path, layers: int) -> int:
    """A random model; returns the bytes of its weights."""
    folder.mkdir()
    config = {**CONFIG, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    settings = model_settings(config)
    model = ModelConfig(**{**settings, "rope_scaling": RopeScalingConfig(**settings["rope_scaling"])})
    parts = all_parts(model, 2048, 4)
    writer = SafetensorsWriter(folder, parts, dict.fromkeys(parts, torch.float32), "20MB")
    for name, shape in parts.items():
        writer.add(name, torch.randn(shape))
    writer.close()
    return sum(torch.Size(shape).numel() * 4 for shape in parts.values())


def private() -> int:
    (line,) = (line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def most(function) -> int:
    before, seen, done = private(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(private())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        function()
    finally:
        done.set()
        thread.join()
    return max(seen) - before


def in_a_fork(function, *arguments) -> int:
    """The function's result, from a process that has done nothing else: memory that was freed before is not used again."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(function(*arguments)))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return queue.get()


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    write(root / "small", 1)
    hf_to_megatron(root / "small", root / "small.megatron", quiet=True)  # what is imported and allocated once
    megatron_to_hf(root / "small.megatron", root / "small.back", quiet=True)
    found = {
        "weights": in_a_fork(write, root / "hf", 11),
        "to_megatron": in_a_fork(most, lambda: hf_to_megatron(root / "hf", root / "megatron", quiet=True)),
        "to_hf": in_a_fork(
            most, lambda: megatron_to_hf(root / "megatron", root / "back", max_shard_size="20MB", quiet=True)
        ),
    }
    print(json.dumps(found))
