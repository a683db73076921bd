"""Weighted losses and gradients of Transformer Engine's cross entropy, its Triton kernels interpreted on the CPU, against torch's.

`TRITON_INTERPRET=1 python run_cross_entropy.py` prints the largest errors as JSON. megatron-core's call: [s, b, vocabulary] logits,
[b, s] losses, a token weight in the gradient of each.
"""

import json

import torch

SEQ, BATCH, VOCABULARY = 5, 2, 40


def numpy_2_5() -> None:
    """NumPy 2.5 makes no int of an array of one element, as which Triton 3.6's interpreter keeps scalars."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def main() -> None:
    numpy_2_5()
    from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

    torch.Tensor.is_cuda = property(lambda self: True)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SEQ, BATCH, VOCABULARY, generator=generator)
    labels = torch.randint(VOCABULARY, (BATCH, SEQ), generator=generator)
    weights = torch.rand(BATCH, SEQ, generator=generator) + 0.5
    weights[0, 2] = 0  # not supervised
    found = []
    for engine in (True, False):
        x, target = logits.clone().requires_grad_(), labels.transpose(0, 1).contiguous()
        if engine:
            losses = te_parallel_cross_entropy(x, torch.as_strided(target, target.size(), (target.size(1), 1)), None)
        else:
            losses = torch.nn.functional.cross_entropy(x.flatten(0, 1), target.flatten(), reduction="none").view(
                SEQ, BATCH
            )
        losses = losses.transpose(0, 1).contiguous()
        (losses * weights).sum().backward()
        found.append((losses.detach(), x.grad))
    print(json.dumps([float((a - b).abs().max()) for a, b in zip(*found)]))


if __name__ == "__main__":
    main()
