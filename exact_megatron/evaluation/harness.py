"""lm-eval (EleutherAI's harness) on a Hugging Face folder: one model, a task at a time, samples back."""

from __future__ import annotations

import logging
from importlib import metadata
from pathlib import Path
from typing import Any

from .model import resolve

LM_EVAL = ">=0.4.13,<0.5"  # setup.py has the same: what ruler_items.py calls is no API, and may change with any version


def require_lm_eval() -> None:
    """Raise ValueError unless lm-eval is installed, in a version that is known here."""
    remedy = "pip install 'exact-megatron[eval]'"
    try:
        found = metadata.version("lm-eval")
    except metadata.PackageNotFoundError:
        raise ValueError(f"ruler and short need lm-eval, which is not installed: {remedy}") from None
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(LM_EVAL).contains(found, prereleases=True):
        raise ValueError(f"ruler and short need lm-eval {LM_EVAL}, {found} is installed: {remedy}")


def open_model(folder: Path, device: str, dtype: str, batch_size: int, max_length: int | None) -> Any:
    """lm-eval's `hf` model.

    Args:
        max_length: tokens of prompt and answer together beyond which lm-eval cuts the prompt's start off; None is the model's
            own.

    Raises:
        ValueError: see require_lm_eval.
    """
    require_lm_eval()
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    device, dtype = resolve(device, dtype)
    return HFLM(pretrained=str(folder), device=device, dtype=dtype, batch_size=batch_size, max_length=max_length)


def task_manager(*folders: str) -> Any:
    """lm-eval's index of the tasks in these folders of lm_eval/tasks; the whole index would take many seconds."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.tasks.__file__).parent
    return TaskManager(include_defaults=False, include_path=[str(root / folder) for folder in folders])


def load(manager: Any, *names: str, **overrides: Any) -> list[Any]:
    """Task objects of tasks or groups, with settings of their files overridden. lm-eval overrides members of groups only."""
    members = [{"task": name, **overrides} for name in names]
    return list(manager.load([{"group": "chosen", "task": members}])["tasks"].values())


def run_task(
    lm: Any, task: Any, manager: Any, limit: int | None, num_fewshot: int | None = None
) -> list[dict[str, Any]]:
    """Samples of one task object, as lm-eval logs them: doc, resps, filter, and the metrics by name.

    Args:
        limit: the first documents only.
    """
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        log_samples=True,
        bootstrap_iters=0,
        verbosity=None,
    )
    assert found is not None  # of ranks but the first, which there are none of
    (samples,) = found["samples"].values()
    return samples
