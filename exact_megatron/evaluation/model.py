"""MODEL of `exact-megatron evaluate`: which kind of folder it is, its fingerprint, its tokenizer, its scorer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..utils.files import read_json
from ..utils.tokenizer import (
    Identity,
    added_tokens,
    find_eod,
    folder_identity,
    identity,
    load_tokenizer,
    tokenizer_file,
)
from .scorer import HuggingFaceScorer, MegatronScorer
from .store import digest, fingerprint


class Text:
    """A tokenizer.json: text to ids and back.

    Attributes:
        start: ids that the tokenizer itself puts before a text, such as LLaMA 3's beginning-of-text; often none.
        vocab_size: largest id + 1.
        digest: changes with the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = tokenizer_file(path)
        if not self.file.is_file():
            raise FileNotFoundError(f"no tokenizer.json at {path}: name it with --tokenizer")
        self._tokenizer = load_tokenizer(self.file)
        self.start = added_tokens(self._tokenizer)[0]
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.digest = digest(self.file.read_bytes())

    @property
    def identity(self) -> Identity:
        """See tokenizer.identity."""
        return Identity(identity(self._tokenizer), str(self.file))

    def encode(self, text: str) -> list[int]:
        """Ids of all of `text`, nothing added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def eod(self) -> int | None:
        """Id of the end of a document, where the tokenizer's folder says one."""
        try:
            return find_eod(self._tokenizer, self.file, None)[1]
        except ValueError:
            return None


@dataclass(frozen=True)
class Model:
    """A model folder.

    Attributes:
        path: the Hugging Face folder, or the checkpoint checkpoints/step_N.
        kind: "huggingface" or "megatron".
        tokenizer_path: given with --tokenizer, or None.
    """

    path: Path
    kind: str
    tokenizer_path: str | None = None

    @classmethod
    def at(cls, path: str | Path, tokenizer: str | None = None) -> Model:
        """Look at a folder.

        Raises:
            FileNotFoundError: neither kind of model.
        """
        from_hub = Path(path, "config.json")
        if from_hub.is_file() and "model_type" in read_json(from_hub):
            return cls(Path(path), "huggingface", tokenizer)
        if not Path(path).is_dir():
            raise FileNotFoundError(
                f"{path} is no folder: give a Hugging Face model folder or a run of the native runner"
            )
        from ..training.checkpoint_files import find_checkpoint

        return cls(find_checkpoint(path), "megatron", tokenizer)

    @property
    def described(self) -> dict[str, Any]:
        """path, kind and fingerprint, for results.json."""
        return {"path": str(self.path), "kind": self.kind, "fingerprint": self.fingerprint}

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the configuration and of blocks of every weight file."""
        patterns = (
            ("*.safetensors", "*.bin", "config.json") if self.kind == "huggingface" else ("*.distcp", "common.pt")
        )
        files = sorted({f for pattern in patterns for f in self.path.glob(pattern)})
        return digest(*((f.name, fingerprint(f)) for f in files))

    def require_huggingface(self, suite: str) -> Path:
        """The folder, for suites that generate text.

        Raises:
            ValueError: it is a Megatron checkpoint.
        """
        if self.kind != "huggingface":
            raise ValueError(
                f"{suite} needs a Hugging Face folder, {self.path} is a Megatron checkpoint: convert first (exact-megatron convert)"
            )
        return self.path

    @cached_property
    def run_config(self) -> dict[str, Any]:
        """The configuration of the run that made a Megatron checkpoint, config.json of a Hugging Face one."""
        if self.kind == "huggingface":
            return json.loads((self.path / "config.json").read_text())
        from omegaconf import OmegaConf

        return OmegaConf.to_container(OmegaConf.create(self.state["config"]))  # type: ignore[return-value]

    @cached_property
    def state(self) -> dict[str, Any]:
        """What a Megatron checkpoint says of its run."""
        from ..training.checkpoint_state import read_state

        return read_state(self.path)

    @cached_property
    def tokenizer(self) -> Identity:
        """The tokenizer whose ids the model knows, as its folder records; where it does not, that of --tokenizer."""
        if self.kind == "huggingface":
            found = folder_identity(self.path)
        else:
            from ..training.checkpoint_state import tokenizer_of

            found = tokenizer_of(self.state)
        return Text(self.tokenizer_path).identity if not found.digest and self.tokenizer_path else found

    @property
    def window(self) -> int | None:
        """Tokens the model was trained on at a time, as far as the folder says."""
        if self.kind == "megatron":
            return int(self.run_config["model"]["data"]["seq_length"])
        return self.run_config.get("max_position_embeddings")

    def text(self) -> Text:
        """The tokenizer: --tokenizer, the model folder's, or the one that the training data were prepared with.

        Raises:
            FileNotFoundError: none of them is there.
        """
        if self.tokenizer_path is not None:
            return Text(self.tokenizer_path)
        if self.kind == "huggingface":
            return Text(self.path)
        data = self.run_config["model"]["data"]["data_prefix"]
        entries = data.get("train", []) if isinstance(data, dict) else data
        for prefix in entries if isinstance(entries, list) else [entries]:
            if found := read_json(f"{prefix}.json").get("tokenizer"):
                return Text(Path(str(prefix)).parent / found)
        raise FileNotFoundError(f"{self.path} does not say which tokenizer its data had: name it with --tokenizer")

    def scorer(self, device: str, dtype: str, tensor_parallel: int = 1) -> HuggingFaceScorer | MegatronScorer:
        """Load the model for log-probabilities.

        Args:
            device: "auto", "cpu" or "cuda"; a Megatron checkpoint runs where there is a GPU on it, else on the CPU.
            dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
        """
        device, dtype = resolve(device, dtype)
        if self.kind == "huggingface":
            return HuggingFaceScorer(self.path, device, dtype)
        return MegatronScorer(self.path, dtype, tensor_parallel)


def resolve(device: str, dtype: str) -> tuple[str, str]:
    """Device and dtype with "auto" settled.

    Raises:
        ValueError: "cuda" without a GPU.
    """
    import torch

    there = torch.cuda.is_available()
    if device.startswith("cuda") and not there:
        raise ValueError(f"--device {device}: torch finds no CUDA device")
    device = device if device != "auto" else "cuda" if there else "cpu"
    return device, dtype if dtype != "auto" else "bfloat16" if device != "cpu" else "float32"
