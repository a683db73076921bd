"""Megatron-Bridge: EXACT in recipes and scripts that end in Bridge's `pretrain(config, forward_step)`.

    from exact_megatron.integrations import bridge

    bridge.install()        # before the script reads its arguments and its configuration

Then `model.exact.enabled=true` works on the command line (bare, with + or ++), and so does a block `model: {exact: ...}` in a YAML
file, although Bridge's configuration has no such key: its parser rejects the bare form and drops the others with a log line. Later
wins: install's arguments, the YAML file, --exact-config, the environment (EXACT_ALPHA), the command line. Scripts that are not to
be edited run under bridge_launch.py, which makes the same call.

Nothing is imported here that the script itself has not asked for: Bridge's own scripts set environment variables before they
import torch's and Bridge's training modules. What is hooked is hooked when it is imported (paths in megatron/bridge/training/):

    utils/omegaconf_utils.py: _apply_overrides                      takes model.exact out of YAML and overrides
    utils/config_utils.py: _ConfigContainerBase.from_dict           the same for a whole configuration from YAML
    pretrain.py: _pretrain                                          trains as bridge_training.py has it, if EXACT is enabled; else
                                                                    refuses to go on from a weighted checkpoint
    os.execv, os.execve                                             keep the settings, and the launcher, if the script starts anew

`_pretrain` and not `pretrain`: scripts and Bridge's own modules import `pretrain` by name, often before this call.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from ..config import PREFIX, TIMING_PREFIX, ExactConfig, ExactError, QKTimingConfig, split_overrides
from .checkpoint_guard import ANEW, refuse_unweighted
from .hooks import replaced, when_imported
from .settings import given_settings, read_block, take_timing

LAUNCHER = "exact_megatron.integrations.bridge_launch"
_installed: Installation | None = None


def install(**defaults: Any) -> Installation:
    """Take EXACT's settings out of sys.argv and hook Megatron-Bridge in this process; a second call changes nothing.

    Args:
        defaults: settings of ExactConfig by name, which YAML, environment and command line override.

    Returns:
        What is installed; its `training` is the run that was hooked, once there is one.

    Raises:
        ValueError: an unknown setting, or a value of the wrong kind.
        ExactError: Bridge is imported already, and is not a version that has what is to be hooked.
    """
    global _installed
    if _installed is None:
        new = Installation(sys.argv, os.environ, defaults)
        sys.argv[1:] = new.rest
        new.hook()
        _installed = new
    return _installed


class Installation:
    """EXACT's settings in one process that may train with Megatron-Bridge.

    Attributes:
        script: path of the script that the process runs.
        rest: the command line without EXACT's settings.
        training: the MegatronBridge that ran, None before it and where EXACT is not enabled.
        ran: whether Bridge's pretrain was called.
        launched: whether the script runs under the launcher, which has to be there again when the script starts anew.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], defaults: Mapping[str, Any]) -> None:
        self.script = os.path.abspath(command[0])
        self._command, self._environment = list(command[1:]), dict(environment)
        self._given, self.rest = given_settings(take_timing(self._command, environment)[1], environment)
        self._block: dict[str, Any] = dict(defaults)
        self._timing_block: dict[str, Any] = {}
        self.training: Any = None
        self.ran = False
        self.launched = False
        _ = self.config  # raises for what is wrong with the defaults

    @property
    def config(self) -> ExactConfig:
        """The settings as far as they have been read: a YAML block is there once the script has applied it."""
        return ExactConfig.from_mapping({**self._block, **self._given})

    @property
    def timing(self) -> QKTimingConfig:
        """The settings of query/key timing, as `config`."""
        return take_timing(self._command, self._environment, self._timing_block)[0]

    def take_block(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return Bridge's configuration, {"model": {...}, ...}, without model.exact and model.qk_timing, which are kept here.

        Raises:
            ValueError: an unknown setting, or a value of the wrong kind.
        """
        model = config.get("model")
        blocks = {"exact": self._block, "qk_timing": self._timing_block}
        if not isinstance(model, Mapping) or not blocks.keys() & model.keys():
            return config
        for name in blocks.keys() & model.keys():
            block = model[name]
            if block is not None and not isinstance(block, Mapping):
                raise ValueError(f"model.{name} must hold settings, {{enabled: true}}, and is {block!r}")
            blocks[name].update(read_block(block))
        _ = self.config, self.timing  # raises for a typo here, and not when training starts
        return {**config, "model": {key: value for key, value in model.items() if key not in blocks}}

    def hook(self) -> None:
        """Hook Bridge's modules, those that are imported already now and the others at their import."""
        training = "megatron.bridge.training"
        when_imported(f"{training}.utils.omegaconf_utils", self._hook_overrides)
        when_imported(f"{training}.utils.config_utils", self._hook_yaml)
        when_imported(f"{training}.pretrain", self._hook_pretrain)
        process = os.getpid()
        for name in ("execv", "execve"):  # the other members of the family call these
            setattr(os, name, self._exec(getattr(os, name), process))

    def _hook_overrides(self, module: ModuleType) -> None:
        stock = _there(module, "_apply_overrides")

        @functools.wraps(stock)
        def apply(config: Any, overrides: Mapping[str, Any]) -> None:
            stock(config, self.take_block(overrides))

        module._apply_overrides = apply  # type: ignore[attr-defined]

    def _hook_yaml(self, module: ModuleType) -> None:
        container = _there(module, "_ConfigContainerBase")
        stock = _there(container, "from_dict").__func__

        @functools.wraps(stock)
        def from_dict(cls: type, config_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            return stock(cls, self.take_block(config_dict), *args, **kwargs)

        container.from_dict = classmethod(from_dict)

    def _hook_pretrain(self, module: ModuleType) -> None:
        stock = _there(module, "_pretrain")

        @functools.wraps(stock)
        def pretrain(*args: Any, **kwargs: Any) -> Any:
            config, timing = self.config, self.timing
            self.ran = True
            with ExitStack() as stack:
                if timing.enabled:
                    from .host import say
                    from .timing import bridge_progress, timed_train_step

                    train = importlib.import_module("megatron.bridge.training.train")
                    timed = timed_train_step(train.train_step, timing, bridge_progress, say)
                    stack.enter_context(replaced(train, "train_step", timed))
                if not config.enabled:
                    state = inspect.signature(stock).bind(*args, **kwargs).arguments["state"]
                    train_state = importlib.import_module("megatron.bridge.training.state").TrainState
                    load = _refusing_weighted(train_state.load_state_dict, config, state)
                    stack.enter_context(replaced(train_state, "load_state_dict", load))
                    return stock(*args, **kwargs)
                from .bridge_training import MegatronBridge

                self.training = MegatronBridge(config)
                return self.training.pretrain(stock, *args, **kwargs)

        module._pretrain = pretrain  # type: ignore[attr-defined]

    def _exec(self, stock: Callable[..., Any], process: int) -> Callable[..., Any]:
        @functools.wraps(stock)
        def execute(path: Any, arguments: Any, *environment: Any) -> Any:
            if os.getpid() == process:  # a fork that becomes another program is no training
                arguments = self.anew(list(arguments))
            return stock(path, arguments, *environment)

        return execute

    def anew(self, command: list[str]) -> list[str]:
        """`[python, script, its arguments]`, with which a script replaces its own process, with EXACT's settings put back.

        Megatron-Bridge 0.6's scripts/training/recipe_runner.py does so, to set environment variables before Python starts. Hooks
        and the arguments that were taken out would be gone, and training would go on without weights.

        Raises:
            ExactError: EXACT is enabled, and the command is something else.
        """
        if len(command) > 1 and os.path.realpath(command[1]) == os.path.realpath(self.script):
            settings = [f"{PREFIX}{key}={'null' if value is None else value}" for key, value in self._given.items()]
            timing = take_timing(self._command, self._environment)[0].to_dict()
            given = split_overrides(self._command, TIMING_PREFIX)[0]
            if timing != QKTimingConfig().to_dict() or given:  # of line and file; the YAML block is read again
                settings += [f"{TIMING_PREFIX}{key}={value}" for key, value in timing.items()]
            return [command[0], *(["-m", LAUNCHER] if self.launched else []), *command[1:], *settings]
        if self.config.enabled or self.timing.enabled:
            raise ExactError(
                f"{self.script} is about to replace its process by {command}, where EXACT would not be hooked: start that under EXACT, "
                "or set model.exact.enabled=false"
            )
        return command


def _refusing_weighted(load: Callable[..., None], config: ExactConfig, state: Any) -> Callable[..., None]:
    @functools.wraps(load)
    def load_state_dict(train_state: Any, values: Mapping[str, Any]) -> None:
        if not state.cfg.checkpoint.finetune:  # which reads a checkpoint's step and drops it
            refuse_unweighted(values.get("exact"), config, ANEW)
        load(train_state, values)

    return load_state_dict


def _there(owner: Any, name: str) -> Any:
    found = getattr(owner, name, None)
    if found is None:
        raise ExactError(f"{owner.__name__} has no {name}: this is not a Megatron-Bridge that EXACT knows")
    return found
