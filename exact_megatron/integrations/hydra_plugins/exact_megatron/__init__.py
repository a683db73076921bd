"""Hydra plugin: `model.exact.*` and `model.qk_timing.*` on NeMo's stock YAML and on the user's own, for scripts that import
MegatronGPTModel.

Hydra imports every module of `hydra_plugins` in every Hydra program. This one does nothing in a program that has not
imported NeMo's MegatronGPTModel by the time Hydra reads its configuration, and imports nothing that Hydra has not imported.

In such a program every YAML file is read through a source of our own that gives `model:` these blocks with all keys, so that
Hydra knows them (NeMo's configurations are closed: a bare `model.exact.enabled=true` would be refused, and a misspelled key still
is). Keys that a file does not set are "???", OmegaConf's word for a value to come: when files are laid over each other it changes
nothing of what the others say, and ExactConfig's default is taken where it is left at the end.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from hydra._internal.core_plugins import file_config_source
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

MODEL = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model"


class ExactSource(file_config_source.FileConfigSource):
    """YAML files of a folder, with the keys of `model.exact` and `model.qk_timing`."""

    @staticmethod
    def scheme() -> str:
        return "exact"

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        config: Any = result.config
        if not isinstance(config, DictConfig):
            return result
        if "model" not in config and "/" not in config_path and result.header["package"] is None:
            config.model = {}
        if isinstance(config.get("model"), DictConfig):
            from exact_megatron.integrations.settings import KEYS, TIMING_KEYS

            for block, keys in (("exact", KEYS), ("qk_timing", TIMING_KEYS)):
                config.model[block] = OmegaConf.merge(dict.fromkeys(keys, "???"), config.model.get(block) or {})
        return result


class ExactSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if MODEL not in sys.modules:
            return
        from exact_megatron.integrations.nemo import install

        install()
        for element in reversed(list(search_path.get_path())):
            scheme, separator, path = (element.path or "").rpartition("://")
            if element.path and scheme in ("", "file"):
                search_path.prepend("exact", f"exact://{os.path.abspath(path)}")
