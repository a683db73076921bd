"""Forks of the real Megatron-LM, made here by editing copies of its files: none trains unweighted, and the ways out of docs/hosts.md."""

from __future__ import annotations

import re

import pytest

from tests.hosts import megatron_lm as lm

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(lm.repository() is None, reason=lm.ABSENT),
]

EXACT = ["model.exact.enabled=true", "model.exact.tau=16", "model.exact.alpha=0.5"]
HOOK = "from exact_megatron.integrations.megatron_lm import from_command_line, hook\n"
MAIN = 'if __name__ == "__main__":'
RETURNED = "return output_tensor, partial(loss_func, loss_mask, model=model)"
SUBCLASS = """
class Own(GPTDataset):
    def __getitem__(self, idx):
        sample = super().__getitem__(idx)
        return {edited}


"""


def edited(text, *pairs):
    """The text with each (old, new) replaced where old stands last."""
    for old, new in pairs:
        assert old in text, old
        before, _, after = text.rpartition(old)
        text = before + new + after
    return text


def write_forks(checkout):
    """Scripts by name, in the checkout's copy."""
    script = (checkout / "pretrain_gpt.py").read_text()
    training = (checkout / "megatron/training/training.py").read_text()
    own = re.sub(r"^( *)from \.(\w*)", r"\1from megatron.training.\2", training, flags=re.M).replace(
        "megatron.training. import", "megatron.training import"
    )
    no_cuda = "\nimport functools\ninitialize_megatron = functools.partial(initialize_megatron, allow_no_cuda=True)\n"
    (checkout / "own_training.py").write_text(own + no_cuda)
    (checkout / "own_losses.py").write_text("from pretrain_gpt import loss_func as per_token_loss\n")
    imported = "    pretrain,\n", ""
    forks = {
        "own_pretrain": [imported, (MAIN, f"from own_training import pretrain\n{MAIN}")],
        "own_pretrain_hooked": [
            imported,
            (MAIN, f"from own_training import pretrain\n{HOOK}pretrain = from_command_line(pretrain)\n{MAIN}"),
        ],
        "own_loss": [
            (RETURNED, RETURNED.replace("loss_func", "own_losses.per_token_loss")),
            ("def forward_step", "import own_losses\ndef forward_step"),
        ],
        "own_loss_hooked": [
            (RETURNED, RETURNED.replace("loss_func", "weighted")),
            (
                "def forward_step",
                f"import own_losses\n{HOOK}weighted = hook(own_losses.per_token_loss)\ndef forward_step",
            ),
        ],
        "second_loss": [
            (RETURNED, "return output_tensor, lambda losses: second(loss_mask, losses)"),
            ("def forward_step", "import own_losses\nsecond = own_losses.per_token_loss\ndef forward_step"),
        ],
        "second_loss_in_validation": [
            (
                RETURNED,
                f"if not torch.is_grad_enabled():\n        return output_tensor, partial(second, loss_mask)\n    {RETURNED}",
            ),
            ("def forward_step", "import own_losses\nsecond = own_losses.per_token_loss\ndef forward_step"),
        ],
        "subclass": [
            ("dataset_type = GPTDataset", "dataset_type = Own"),
            ("def train_valid_test", SUBCLASS.format(edited="sample") + "def train_valid_test"),
        ],
        "other_samples": [
            ("dataset_type = GPTDataset", "dataset_type = Own"),
            (
                "def train_valid_test",
                SUBCLASS.format(edited='{**sample, "labels": sample["tokens"]}') + "def train_valid_test",
            ),
        ],
    }
    for name, pairs in forks.items():
        (checkout / f"{name}.py").write_text(edited(script, *pairs))
    return list(forks)


@pytest.fixture(scope="module", params=lm.refs())
def logs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks")
    checkout = lm.copy_checkout(request.param, folder)
    data = lm.write_data(folder, "x", 11)
    usual = [*lm.arguments(checkout, folder), "--spec", "cpu_spec", "layer", "--data-path", data, "--split", "90,10,0"]
    usual += ["--reset-attention-mask", "--train-iters", "2", "--exit-interval", "1000"]

    def job(name, script, *more):
        return {"name": name, "mode": "launch", "arguments": [*EXACT, str(checkout / f"{script}.py"), *usual, *more]}

    jobs = [job(name, name) for name in ["pretrain_gpt", *write_forks(checkout)]]
    jobs.append(job("leaves", "own_pretrain", "--exit-interval", "1"))
    jobs.append(job("refused_early", "pretrain_gpt", "--iterations-to-skip", "3"))
    lm.run_jobs(checkout, folder, 1, jobs)
    return lambda name: lm.Log(folder, name)


@pytest.mark.parametrize("name", ["own_pretrain_hooked", "own_loss_hooked", "subclass"])
def test_the_ways_out_print_the_losses_of_the_stock_script(logs, name):
    assert logs(name).steps() == logs("pretrain_gpt").steps()
    assert len(logs(name).steps()) == 2 and "exact loss" in logs(name).steps()[1]
    assert logs(name).validation() == logs("pretrain_gpt").validation()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_pretrain", "own_pretrain.py is about to train and never called megatron.training.pretrain"),
        ("leaves", "own_pretrain.py is about to train and never called megatron.training.pretrain"),
        ("own_loss", "the loss function loss_func in pretrain_gpt.py, which EXACT has not hooked"),
        ("second_loss", "forward_step.<locals>.<lambda> in second_loss.py, which EXACT has not hooked"),
        ("other_samples", "those of Own are others: labels of sample 0"),
        ("refused_early", "would be another batch's: unset --iterations-to-skip"),
    ],
)
def test_others_end_before_their_first_step_with_one_reason(logs, name, words):
    log = logs(name)
    assert not log.ok and log.text.count(words) == 1, log.text[-3000:]
    assert not re.search(r"iteration +1/", log.text) and "Traceback" not in log.text
    assert words in log.text.rpartition("exact-megatron launch: ")[2]


def test_a_second_loss_function_of_validation_is_found_there(logs):
    log = logs("second_loss_in_validation")
    assert not log.ok and "which EXACT has not hooked" in log.text and "validation loss at" not in log.text


def test_arguments_are_looked_at_before_the_model_is_built(logs):
    assert "number of parameters" in logs("pretrain_gpt").text
    assert "number of parameters" not in logs("refused_early").text
