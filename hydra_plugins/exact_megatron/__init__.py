"""Hydra plugin: `model.exact.*` on NeMo's stock YAML and on the user's own, for scripts that import MegatronGPTModel.

Hydra imports every module of `hydra_plugins` in every Hydra program. This one does nothing in a program that has not
imported NeMo's MegatronGPTModel by the time Hydra reads its configuration, and imports nothing that Hydra has not imported.

In such a program every YAML file is read through a source of our own that gives a `model:` block the defaults of `model.exact`, so
that Hydra knows the keys (NeMo's configurations are closed: a bare `model.exact.enabled=true` would be refused, and a misspelled key
is). What the file says wins over the defaults, and what later files and the command line say wins over the file.
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
    """YAML files of a folder, with the defaults of `model.exact`."""

    @staticmethod
    def scheme() -> str:
        return "exact"

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        model: Any = result.config.get("model") if isinstance(result.config, DictConfig) else None
        if isinstance(model, DictConfig):
            from exact_megatron.integrations.nemo_plan import settings

            model.exact = OmegaConf.merge(settings(None).to_dict(), model.get("exact") or {})
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
