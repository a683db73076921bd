"""Process groups that the layouts of one rank script share."""

from __future__ import annotations

from typing import Any

import torch


def share_process_groups() -> None:
    """Have torch.distributed.new_group return the group that was made for the same ranks before, to the end of this process.

    megatron.core asks for about 30 groups a layout, and destroy_model_parallel leaves most of them as they are. Each has three
    threads, one of which wakes 100 times a second (gloo's event loop): after 25 layouts a rank had 1,000 threads and spent most of
    its time in them. Groups that differ in their purpose alone become one; all ranks ask for them, and use them, in one order.
    """
    made: dict[tuple[int, ...], Any] = {}
    new_group, destroy_process_group = torch.distributed.new_group, torch.distributed.destroy_process_group

    def shared(ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        key = tuple(range(torch.distributed.get_world_size()) if ranks is None else ranks)
        if key not in made:
            made[key] = new_group(ranks, *args, **kwargs)
        return made[key]

    def destroy(group: Any = None) -> None:
        if group is None:  # all of them
            made.clear()
            destroy_process_group()

    torch.distributed.new_group = shared
    torch.distributed.destroy_process_group = destroy
