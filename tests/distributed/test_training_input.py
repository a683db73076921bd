"""What the native runner refuses before training, and what a document may not see."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from exact_megatron.training.config import load_config, parse_blend
from tests.helpers.ranks import launch
from tests.helpers.tiny import config_file, write_data, write_documents

EXPERTS = ["model.num_moe_experts=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    config_file(folder, write_data(folder))
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.exact.enable=true"], r"unknown key model\.exact\.enable: did you mean model\.exact\.enabled"),
        (["model.exact.alpha=-1"], "model.exact.alpha=-1 is not a finite number of at least 0"),
        (["model.exact.alpha=nan"], "alpha=nan is not a finite number"),
        (["model.exact.alpha=much"], "model.exact.alpha='much' is not a finite number"),
        (["model.exact.gamma=-0.5"], "gamma=-0.5 is not a finite number of at least 0"),
        (["model.exact.tau=64"], "tau=64 lies above the last bucket of a window of 64 tokens, which starts at 32"),
        (["model.tensor_parallel_size=2"], "unknown key .* did you mean model.tensor_model_parallel_size"),
        (["trainer.max_step=3"], "did you mean trainer.max_steps"),
        (["trainer.max_steps"], "expected key=value, got 'trainer.max_steps'"),
        (["trainer.max_steps=few"], "trainer.max_steps='few' is not a whole number"),
        (["trainer.precision=16"], "trainer.precision='16' is not one of 32, bf16"),
        (["trainer.max_steps=0"], "trainer.max_steps=0 is not a whole number of at least 1"),
        (["model.tensor_model_parallel_size=2"], "1 ranks .* cannot be divided into groups of tensor 2"),
        (["model.global_batch_size=6", "model.micro_batch_size=4"], "global_batch_size=6 must be a multiple of .* = 4"),
        (["model.num_query_groups=3"], "num_attention_heads=4 must be a multiple of num_query_groups=3"),
        (
            ["trainer.devices=2", "model.context_parallel_size=2", "model.data.seq_length=66"],
            "seq_length=66 must be a multiple of 2 x model.context_parallel_size = 4",
        ),
        (
            ["trainer.devices=4", "model.tensor_model_parallel_size=4", "model.sequence_parallel=true"]
            + ["model.num_query_groups=4", "model.data.seq_length=66"],
            "66 tokens of a context-parallel rank to be a multiple of model.tensor_model_parallel_size=4",
        ),
        (
            ["trainer.devices=2", "model.pipeline_model_parallel_size=2"]
            + ["model.virtual_pipeline_model_parallel_size=2", "model.batch_p2p_comm=true"],
            "batch_p2p_comm=true with virtual pipeline stages gives wrong gradients",
        ),
        (["model.virtual_pipeline_model_parallel_size=2"], "needs model.pipeline_model_parallel_size > 1"),
        (
            ["trainer.devices=8", "model.tensor_model_parallel_size=4", "model.sequence_parallel=true"]
            + ["model.num_query_groups=4", "model.context_parallel_size=2", "model.data.seq_length=68"],
            "34 tokens of a context-parallel rank to be a multiple of model.tensor_model_parallel_size=4",
        ),
        (["model.cp_comm_type=p2p"], "cp_comm_type='p2p' is not one of a2a, all_gather, or null"),
        (["model.cp_comm_type=ulysses"], "cp_comm_type='ulysses' is not one of a2a, all_gather"),
        (
            ["trainer.devices=4", "model.tensor_model_parallel_size=2", "model.context_parallel_size=2"]
            + ["model.cp_comm_type=a2a"],
            "the 1 KV heads of a tensor-parallel rank do not divide by model.context_parallel_size=2: use all_gather",
        ),
        (["model.attention_dropout=0.1"], "attention_dropout=0.1: the attention over documents has none"),
        (
            ["model.mtp_num_layers=1", "model.loss_chunk_tokens=8"],
            "mtp_num_layers=1 takes all logits of a depth at once",
        ),
        (
            ["model.mtp_num_layers=1", "model.activations_checkpoint_granularity=full"]
            + ["model.activations_checkpoint_method=uniform", "model.activations_checkpoint_num_layers=2"],
            "needs model.activations_checkpoint_num_layers=1, not 2",
        ),
        (["model.moe_aux_loss_coeff=0.1"], "moe_aux_loss_coeff=0.1 without experts: set model.num_moe_experts"),
        (["model.expert_model_parallel_size=2"], "expert_model_parallel_size=2 without experts"),
        (
            [*EXPERTS, "model.expert_model_parallel_size=3"],
            "=4 must be a multiple of model.expert_model_parallel_size=3",
        ),
        (
            [*EXPERTS, "model.expert_model_parallel_size=2"],
            "=2 must divide the 1 ranks of data and context parallelism",
        ),
        ([*EXPERTS, "model.moe_router_topk=5"], "moe_router_topk=5 is above model.num_moe_experts=4"),
        (
            [*EXPERTS, "trainer.devices=2", "model.tensor_model_parallel_size=2"],
            "model.tensor_model_parallel_size=2 needs model.sequence_parallel=true",
        ),
        (
            [*EXPERTS, "model.moe_aux_loss_coeff=0.1", "model.moe_router_load_balancing_type=none"],
            "=none, which has no auxiliary loss",
        ),
        ([*EXPERTS, "model.moe_router_load_balancing_type=sinkhorn"], "is not one of aux_loss, seq_aux_loss, none"),
        ([*EXPERTS, "model.fp8=true"], "FP8 experts were never run"),
        (["model.data.document_masking=false"], "weighted by a context that is not what they see"),
        (
            ["trainer.devices=2", "model.context_parallel_size=2", "model.calculate_per_token_loss=false"],
            "supervise different numbers of targets",
        ),
        (["model.activations_checkpoint_granularity=full"], "needs model.activations_checkpoint_method"),
        (["model.optim.overlap_param_sync=true"], "overlap_param_sync needs a distributed optimizer"),
        (["model.optim.sched.warmup_steps=9"], "warmup_steps=9 must be below trainer.max_steps=4"),
        (["model.optim.sched.name=WSD"], "WSD schedule needs model.optim.sched.wsd_decay_steps in 1..4, not 0"),
        (["model.data.data_prefix=[]"], "data_prefix is empty"),
        (["model.optim.sched.min_lr=1"], "min_lr=1.0 is above model.optim.lr=0.005"),
        (["model.data.splits_string=abc"], "splits_string='abc' is not up to three shares"),
        (["model.kv_channels=0"], "model.kv_channels=0 is not a whole number of at least 1, or null"),
        (["model.data.data_prefix={train: [/x]"], "is not YAML"),
    ],
)
def test_settings_are_refused_before_anything_starts(folder, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(folder / "tiny.yaml", overrides)


@pytest.mark.parametrize(
    "key",
    ["multi_latent_attention", "is_hybrid_model", "hybrid_context_parallel", "fused_single_qkv_rope"]
    + ["fp8_dot_product_attention", "window_size", "softmax_type"],
)
def test_attention_that_documents_do_not_have_cannot_be_asked_for(folder, key):
    """`check_supported` refuses these in other hosts; here there is no such key, and no run that drops it in silence."""
    with pytest.raises(ValueError, match=f"unknown key model.{key}: "):
        load_config(folder / "tiny.yaml", [f"model.{key}=1"])


@pytest.mark.parametrize("comm", ["null", "a2a", "all_gather"])
def test_the_exchange_under_context_parallelism_can_be_chosen(folder, comm):
    cp = ["trainer.devices=2", "model.context_parallel_size=2", f"model.cp_comm_type={comm}"]
    assert load_config(folder / "tiny.yaml", cp).model.cp_comm_type == (None if comm == "null" else comm)


def test_mean_of_means_under_context_parallelism_where_all_ranks_supervise_alike(folder):
    """Equal to the sum divided once (test_layouts.py: not_per_token_cp2); refused with masked targets, see above."""
    cp = ["trainer.devices=2", "model.context_parallel_size=2", "model.data.eod_mask_loss=false"]
    assert not load_config(folder / "tiny.yaml", [*cp, "model.calculate_per_token_loss=false"]).model.data.eod_mask_loss


def test_negative_ids_are_refused_and_empty_documents_are_packed(folder, tmp_path):
    from exact_megatron.training.data_files import read_vocabulary

    for name, documents, message in (
        ("negative", [[3, -7, 0]] * 20, "holds token id -7, the vocabulary has 0..95"),
        ("empty", [[], [3, 5, 0], []] * 20, None),
        ("open", [[], [3, 5, 1], []] * 20, "20 of the first 20 documents"),
        ("nothing", [[], []], "holds 2 sequences and no token"),
    ):
        write_documents(tmp_path / name, documents, np.int32)
        run = load_config(folder / "tiny.yaml", [f"model.data.data_prefix=[{tmp_path / name}]"])
        if message is None:
            assert read_vocabulary(run).vocab_size == 96
            continue
        with pytest.raises(ValueError, match=message):
            read_vocabulary(run)


def test_a_missing_file_and_a_typo_in_it(folder, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "typo.yaml"
    path.write_text("model: {exact: {enabledd: true}, data: {data_prefix: [x]}}")
    with pytest.raises(ValueError, match=r"model\.exact\.enabledd: did you mean model\.exact\.enabled"):
        load_config(path)


def test_unmasked_documents_can_be_asked_for(folder):
    run = load_config(
        folder / "tiny.yaml", ["model.data.document_masking=false", "model.exact.allow_unmasked_documents=true"]
    )
    assert run.model.exact.enabled and not run.model.data.document_masking


def test_data_that_do_not_fit_are_refused(folder, tmp_path):
    from exact_megatron.training.data_files import read_vocabulary

    def refused(error, message, *overrides):
        with pytest.raises(error, match=message):
            read_vocabulary(load_config(folder / "tiny.yaml", list(overrides)))

    refused(ValueError, r"holds token id \d+, the vocabulary has 0..49", "model.override_vocab_size=50")
    refused(FileNotFoundError, "nowhere.idx does not exist", "model.data.data_prefix=[nowhere]")
    refused(ValueError, "set model.override_vocab_size and model.data.eod_id", "model.override_vocab_size=null")
    refused(ValueError, "has splits train, validation, test, not 'valid'", "model.data.data_prefix={valid: [x]}")
    both = "model.data.data_prefix={train: nowhere, validation: x}"
    refused(FileNotFoundError, "nowhere.idx does not exist", both)
    refused(ValueError, "no train: name the training data", "model.data.data_prefix={validation: x}")
    unseen = ["model.data.data_prefix={train: x}", "trainer.limit_val_batches=1"]
    refused(ValueError, "limit_val_batches=1 asks for validation", *unseen)
    refused(ValueError, r"give the common prefix of .bin and .idx, x$", "model.data.data_prefix=[x.bin]")
    refused(ValueError, "each must be above 0", "model.data.data_prefix=[0, a, 0, b]")
    refused(ValueError, "eod_id=5000 is not in the vocabulary of 96", "model.data.eod_id=5000")
    refused(ValueError, "do not end in model.data.eod_id=50", "model.data.eod_id=50")
    (folder / "x.json").write_text('{"vocab_size"')
    refused(ValueError, r"x.json does not give vocab_size and eod_id")
    described = folder / "x.json"
    described.write_text(json.dumps({"vocab_size": 100, "eod_id": 0}))
    try:
        refused(ValueError, "override_vocab_size=96 is below the 100 tokens")
        assert read_vocabulary(load_config(folder / "tiny.yaml", ["model.override_vocab_size=128"])).vocab_size == 128
        assert read_vocabulary(load_config(folder / "tiny.yaml", ["model.override_vocab_size=null"])).vocab_size == 100
    finally:
        described.unlink()


def test_splits_and_members_without_a_sample_are_refused_by_name(folder, tmp_path, write_corpus):
    """Before anything starts, in plan and doctor too."""
    from exact_megatron.commands.doctor import native_run
    from exact_megatron.planning.data import read_data
    from exact_megatron.training.lengths import check_lengths

    long, short, few = (str(tmp_path / name) for name in ("long", "short", "few"))
    for prefix, lengths in ((long, [500] * 20), (short, [30, 10]), (few, [900] * 2)):
        write_corpus(np.array(lengths), prefix, tokens=np.zeros(sum(lengths), np.int64))

    def run(prefixes, *overrides):
        return load_config(folder / "tiny.yaml", [f"model.data.data_prefix={prefixes}", *overrides])

    valid = "trainer.limit_val_batches=2"
    for prefixes, overrides, message in (
        (
            f"[{long}, {short}]",
            ["model.data.splits_string=1"],
            f"{short} has no sample in the train .*40 tokens, .* needs 65",
        ),
        (
            f"{{train: [{long}], validation: [{long}, {short}]}}",
            [valid],
            f"{short} has no sample in the validation split",
        ),
        (f"[{long}, {few}]", [valid], f"the validation split of {few} holds no token .of 2 documents"),
        (
            f"[{long}]",
            [valid, "model.data.splits_string='100,0,0'"],
            "'100,0,0' has no share for the validation split.* 16 samples",
        ),
    ):
        for look in (check_lengths, read_data):
            with pytest.raises(ValueError, match=message):
                look(run(prefixes, *overrides))
        config = [str(folder / "tiny.yaml")]
        refused = native_run(config, [f"model.data.data_prefix={prefixes}", *overrides])["refused"]
        assert any(re.search(message, line) for line in refused), refused
    for prefixes, overrides in (
        (f"[{long}, {few}]", []),  # no validation asked for
        (f"[0.9, {long}, 0.1, {short}]", ["model.data.splits_string=1"]),  # repeated by its weight
        (f"[{long}, {short}]", ["model.data.splits_string=1", "trainer.max_steps=1000"]),  # repeated with the others
    ):
        check_lengths(run(prefixes, *overrides))
        assert read_data(run(prefixes, *overrides))[0] is not None


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["a"], (["a"], None)),
        (["a", "b"], (["a", "b"], None)),
        ([0.3, "a", "0.7", "b"], (["a", "b"], [0.3, 0.7])),
        ([1, "a"], (["a"], [1.0])),
        (["2024", "b", "c"], (["2024", "b", "c"], None)),
    ],
)
def test_blends(entries, expected):
    assert parse_blend(entries) == expected


def test_a_batch_with_a_foreign_token_is_refused():
    import torch

    from exact_megatron.training.data import Collate

    sample = {k: torch.tensor([1, 2, 300]) for k in ("tokens", "labels", "loss_mask", "position_ids")}
    with pytest.raises(ValueError, match="token id 300, the vocabulary has 0..299"):
        Collate(300, 3)([sample])
    sample["tokens"][2] = -7
    with pytest.raises(ValueError, match="token id -7, the vocabulary has 0..300"):
        Collate(301, 3)([sample])


def test_a_batch_without_boundaries_is_refused_where_documents_are_masked():
    import torch

    from exact_megatron.config import ExactError
    from exact_megatron.training.data import get_batch

    with pytest.raises(ExactError, match="the batch has no boundaries"):
        get_batch(iter([{"tokens": torch.zeros(1, 8)}]), torch.device("cpu"), documents=True)


def test_boundaries_of_a_micro_batch_are_flattened():
    import torch

    from exact_megatron.training.data import Collate

    def sample(cu):
        padded = np.full(9, 8)
        padded[: len(cu)] = cu
        fields = {k: torch.zeros(8, dtype=torch.long) for k in ("tokens", "labels", "loss_mask", "position_ids")}
        return {**fields, "cu_seqlens": torch.from_numpy(padded)}

    batch = Collate(1, 8)([sample([0, 3, 8]), sample([0, 8]), sample([0, 1, 2, 8])])
    assert batch["boundaries"].tolist() == [0, 3, 8, 16, 17, 18, 24]
    assert batch["boundaries"].dtype == torch.int32 and batch["tokens"].shape == (3, 8)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_document_does_not_see_its_neighbours(folder, tmp_path, ranks):
    """Two ranks are context-parallel, with each exchange."""
    launch("distributed/run_leak.py", [str(folder / "tiny.yaml"), str(tmp_path / "leak.json")], ranks)
    results = json.loads((tmp_path / "leak.json").read_text())
    assert len(results) == (1 if ranks == 1 else 4), "one for each exchange and rank"
    for result in results:
        assert result == {"logits": True, "gradients": True, "nonzero": True, "unmasked_leaks": True}


def identified(folder, name, digest):
    """A copy of the data, with what PREFIX.json says of its tokenizer (None: no PREFIX.json)."""
    for end in ("bin", "idx"):
        (folder / f"{name}.{end}").write_bytes((folder / f"x.{end}").read_bytes())
    if digest:
        facts = {"vocab_size": 96, "eod_id": 0, "tokenizer": f"tok_{digest}", "tokenizer_identity": digest}
        (folder / f"{name}.json").write_text(json.dumps(facts))
    return str(folder / name)


def test_blends_of_two_tokenizers_are_refused(folder):
    from exact_megatron.training.data_files import read_vocabulary

    def read(*names, **more):
        overrides = [f"model.data.data_prefix=[{','.join(names)}]", *(f"{k}={v}" for k, v in more.items())]
        return read_vocabulary(load_config(folder / "tiny.yaml", overrides), scan=False)

    a, b, c, d = (identified(folder, *pair) for pair in (("a", "aa"), ("b", "bb"), ("c", "aa"), ("d", None)))
    with pytest.raises(
        ValueError, match=r"a has the tokenizer aa \(.*a.json, tokenizer tok_aa\), .*b has bb \(.*tok_bb.*accept"
    ):
        read(a, d, b)
    assert read(a, b, **{"model.data.accept_other_tokenizer": "true"}).tokenizers[b].digest == "bb"
    assert read(a, c, d).tokenizers[d].digest is None
    assert "tokenizers" not in read(a).unique_identifiers  # which names Megatron's caches


def test_an_accepted_tokenizer_may_have_another_vocabulary(folder):
    from exact_megatron.training.data_files import read_vocabulary

    def read(*names, **more):
        more = {"override_vocab_size": "null", "data.eod_id": "null", **more}
        overrides = [f"model.data.data_prefix=[{','.join(names)}]", *(f"model.{k}={v}" for k, v in more.items())]
        return read_vocabulary(load_config(folder / "tiny.yaml", overrides), scan=False)

    accept = {"data.accept_other_tokenizer": "true"}
    small, large = identified(folder, "small", "aa"), identified(folder, "large", "bb")
    facts = json.loads((folder / "large.json").read_text())
    (folder / "large.json").write_text(json.dumps(facts | {"vocab_size": 128}))
    for order in ((small, large), (large, small)):
        assert read(*order, **accept).vocab_size == 128
        assert read(*order, override_vocab_size=512, **accept).vocab_size == 512
        with pytest.raises(ValueError, match="override_vocab_size=100 is below the 128 tokens of .*large's"):
            read(*order, override_vocab_size=100, **accept)
    (folder / "large.json").write_text(json.dumps(facts | {"vocab_size": 128, "tokenizer_identity": None}))
    with pytest.raises(
        ValueError, match="small.json says vocab_size 96, .*large.json says 128: .*accept_other_tokenizer=true"
    ):
        read(small, large)
    (folder / "large.json").write_text(json.dumps(facts | {"eod_id": 5}))
    with pytest.raises(ValueError, match="small.json says eod_id 0, .*large.json says 5: set model.data.eod_id"):
        read(small, large, **accept)
    assert read(small, large, **accept, **{"data.eod_id": 5}).eod == 5
