"""`exact-megatron plan`: its memory and work against what a real model has and does, and its checks and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from exact_megatron import ExposureCensus, WeightTable
from exact_megatron.cli import main
from exact_megatron.packing import read_index
from exact_megatron.planning import flops as planning_flops
from exact_megatron.planning import measured as planning_measured
from exact_megatron.planning.memory import (
    OVERHEAD,
    PARTS,
    chunks_in_flight,
    layer_activations,
    layer_parameters,
    memory,
    parameters,
    stage_memory,
)
from exact_megatron.training.config import load_config
from tests.helpers.ranks import launch
from tests.helpers.tiny import SEQ_LENGTH, VOCABULARY, config_file, write_data

WIDE = ["model.hidden_size=128", "model.ffn_hidden_size=256"]  # so that buffers' padding is small
TP2 = ["trainer.devices=2", "model.tensor_model_parallel_size=2"]
TP4 = ["model.tensor_model_parallel_size=4", "model.num_query_groups=4"]
PP2 = ["trainer.devices=2", "model.pipeline_model_parallel_size=2"]
DP2 = ["trainer.devices=2"]
CP2 = ["trainer.devices=2", "model.context_parallel_size=2"]
BF16 = ["trainer.precision=bf16"]
PLAIN = ["model.optim.name=adam"]
TIED = ["model.share_embeddings_and_output_weights=true"]
QWEN = ["model.qkv_bias=true", "model.qk_layernorm=true"]
GPT = ["model.normalization=layernorm", "model.activation=gelu", "model.bias=true", "model.num_query_groups=null"]
FULL = [
    "model.activations_checkpoint_granularity=full",
    "model.activations_checkpoint_method=uniform",
    "model.activations_checkpoint_num_layers=1",
]

LAYOUTS = {
    1: {"one": PLAIN, "one_bf16": [*BF16, *PLAIN]},
    2: {
        "tp2_qwen_bf16": [*TP2, *QWEN, *BF16, *PLAIN],
        "tp2_gpt": [*TP2, *GPT, *PLAIN],
        "pp2_tied_bf16": [*PP2, *TIED, *BF16],
        "pp2_vpp2": [*PP2, *PLAIN, "model.virtual_pipeline_model_parallel_size=2"],
        "dp2": DP2,
        "dp2_bf16": [*DP2, *BF16],
        "cp2_bf16": [*CP2, *BF16],
    },
}
SAVED = {
    "saved": [],
    "saved_gelu": GPT[:2],
    "saved_selective": ["model.activations_checkpoint_granularity=selective"],
    "saved_full": FULL,
    "saved_mbs2": ["model.micro_batch_size=2"],
    "saved_window": ["model.data.seq_length=256"],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return config_file(folder, write_data(folder))


@pytest.fixture(scope="module")
def measured(tiny):
    """Folder with memory.json of every layout, the forwards of SAVED, and one whole run."""
    for world, layouts in LAYOUTS.items():
        jobs = {name: [*WIDE, *overrides] for name, overrides in layouts.items()}
        if world == 1:
            jobs |= {name: [*WIDE, *overrides] for name, overrides in SAVED.items()}
            jobs["fit"] = [*WIDE, "trainer.max_steps=5"]
        (tiny.parent / "jobs.json").write_text(json.dumps(jobs))
        launch("distributed/run_memory.py", [str(tiny), str(tiny.parent / "jobs.json"), str(tiny.parent)], world)
    return tiny.parent


@pytest.mark.parametrize("name", [name for layouts in LAYOUTS.values() for name in layouts])
def test_weights_gradients_and_optimizer_are_those_of_the_real_model(tiny, measured, name):
    """Parameters exactly; bytes but for the padding of megatron.core's buffers, below 2 % even of this small model."""
    overrides = next(layouts[name] for layouts in LAYOUTS.values() if name in layouts)
    run = load_config(tiny, [*WIDE, *overrides])
    ranks = json.loads((measured / name / "memory.json").read_text())["ranks"]
    assert len(ranks) == run.world_size
    for part in memory(run, VOCABULARY):
        of_stage = [rank for rank in ranks if rank["stage"] == part.stage]
        assert {rank["parameters"] for rank in of_stage} == {part.parameters}
        for kind in ("weights", "gradients"):
            for rank in of_stage:
                assert part.__getattribute__(kind) <= rank[kind] <= 1.02 * part.__getattribute__(kind), kind
        mean = sum(rank["optimizer"] for rank in of_stage) / len(of_stage)  # shards differ by whole parameters' parts
        assert mean == pytest.approx(part.optimizer, rel=0.02)


def test_parameters_of_the_whole_model_do_not_depend_on_the_layout(tiny):
    whole = parameters(load_config(tiny, WIDE), VOCABULARY)
    for layout in (TP2, PP2, [*PP2, *TIED]):
        run = load_config(tiny, [*WIDE, *layout])
        table = VOCABULARY * 128 if layout[-1:] == TIED else 0
        assert parameters(run, VOCABULARY) == whole - table


@pytest.mark.parametrize("name", SAVED)
def test_activations_are_what_autograd_saves(tiny, measured, name):
    """In fp32 on a CPU, without fused kernels; what these would not keep is added to the estimate here, by name."""
    run = load_config(tiny, [*WIDE, *SAVED[name]])
    m, part = run.model, stage_memory(run, VOCABULARY, 0)
    tokens = m.data.seq_length * m.micro_batch_size
    norm = (
        m.hidden_size if m.normalization == "rmsnorm" else 0
    )  # torch's keeps the normalized input beside input and output
    unfused = 2 * norm
    if m.activation == "fast-swiglu":
        unfused += 2 * m.ffn_hidden_size  # silu(x), and y + 0
    if m.activations_checkpoint_granularity != "selective" and m.micro_batch_size == 1:
        unfused += m.hidden_size  # pieces of documents, joined
    expected, layers = part.activations + part.logits, m.num_layers
    if m.activations_checkpoint_granularity == "full":
        expected, layers = expected - layer_activations(run), 0  # before backward nothing is computed again
    expected += 4 * tokens * (layers * unfused + norm)
    found = json.loads((measured / f"{name}.json").read_text())["bytes"]
    # Not counted: token ids, norms' statistics, RoPE's angles; in the second case there is little else.
    assert expected == pytest.approx(found, rel=0.05 if "full" in name else 0.01)


def test_matrix_products_are_what_torch_counts(tiny, measured):
    run = load_config(tiny, WIDE)
    flops = planning_flops.flops_per_token(run, VOCABULARY, None)
    counted = json.loads((measured / "saved.json").read_text())["matrix_flops"]
    assert (flops["total"] - flops["attention"]) / 3 * SEQ_LENGTH == counted


def test_activations_as_in_the_paper(tiny):
    """Korthikanti et al. (arXiv 2205.05198), table 2: s b h (10 + 24 / t) bytes a layer without, 34 / t with sequence
    parallelism, attention scores apart; of a GPT in bf16 with f = 4 h. There: dropout masks (2 h over 1 or t ranks), no RoPE,
    no fused QKV output kept beside q and k (4 h over t)."""
    sizes = [
        "model.hidden_size=4096",
        "model.ffn_hidden_size=16384",
        "model.num_attention_heads=32",
        "model.data.seq_length=2048",
    ]
    for t, split, paper in ((1, 1, 34), (8, 1, 10 + 24 / 8), (8, 8, 34 / 8)):
        run = load_config(
            tiny,
            [
                *BF16,
                *GPT,
                *sizes,
                f"trainer.devices={t}",
                f"model.tensor_model_parallel_size={t}",
                "model.exact.tau=512",
            ]
            + [f"model.sequence_parallel={str(split > 1).lower()}", "model.hidden_dropout=0.1"],
        )
        rope, logarithms = 4 * 128 * 2, 4 * 32 / t
        ours = layer_activations(run) / 2048 - rope - logarithms
        assert ours == pytest.approx(4096 * (paper + 4 / t))


def test_weights_and_optimizer_as_in_megatron_lm(tiny):
    """compute_weight_and_optimizer_memory of theoretical_memory_usage.py (Megatron-LM core_v0.19.0), for LLaMA-3.1 70B: on the
    most loaded stage L / p layers, a p-th of the final norm, one table; 6 + 12 / d bytes a parameter."""
    h, f, layers, vocabulary, tp, pp = 8192, 28672, 80, 128256, 8, 4
    run = load_config(["configs/cpt.yaml", "configs/models/llama-3.1-70b.yaml", "configs/stages/8k.yaml"])
    layer = 2 * h * h * (1 + 8 / 64) + 2 * h * f * 3 / 2
    loaded = (layer * layers / pp + h * vocabulary) / tp + (2 * h * layers + h) / pp
    theirs = loaded * (6 + 12 / run.data_parallel_size)
    first = memory(run, vocabulary)[0]
    ours = first.weights + first.gradients + first.optimizer
    assert ours == pytest.approx(theirs, rel=1e-5)
    plain = replace(run.model, optim=replace(run.model.optim, name="adam", overlap_param_sync=False))
    first = memory(replace(run, model=plain), vocabulary)[0]
    assert first.weights + first.gradients + first.optimizer == pytest.approx(loaded * 18, rel=1e-5)


@pytest.mark.parametrize(("p", "v", "micro"), [(4, None, 8), (4, None, 2), (4, 2, 8), (8, 4, 16), (2, 2, 2)])
def test_layers_in_flight(tiny, p, v, micro):
    """By walking through the schedule: a stage's first backward comes after as many forwards as Megatron warms up with, and one."""
    layers = p * (v or 1)
    run = load_config(
        tiny,
        [f"trainer.devices={p}", f"model.pipeline_model_parallel_size={p}", f"model.num_layers={layers}"]
        + [f"model.virtual_pipeline_model_parallel_size={v or 'null'}", f"model.global_batch_size={micro}"],
    )
    for stage in range(p):
        total = micro * (v or 1)
        warmup = p - stage - 1 if v is None else 2 * (p - stage - 1) + (v - 1) * p
        warmup, held, most = min(warmup, total), 0, 0
        order = ["forward"] * warmup + ["forward", "backward"] * (total - warmup) + ["backward"] * warmup
        for what in order:
            held += 1 if what == "forward" else -1
            most = max(most, held)
        assert held == 0 and chunks_in_flight(run, stage) == most
    if v and micro >= 2 * p:
        assert chunks_in_flight(run, 0) / v / p == pytest.approx(1 + (p - 1) / (p * v))  # the paper's section 4.2.3


def test_recomputation_fp8_and_context_parallelism(tiny):
    plain = stage_memory(load_config(tiny, WIDE), VOCABULARY, 0)
    full = stage_memory(load_config(tiny, [*WIDE, *FULL]), VOCABULARY, 0)
    run = load_config(tiny, WIDE)
    hidden = SEQ_LENGTH * 128 * 4
    assert plain.activations == 4 * layer_activations(run)
    assert full.activations == 4 * hidden + layer_activations(run)
    block = [FULL[0], "model.activations_checkpoint_method=block", "model.activations_checkpoint_num_layers=3"]
    some = stage_memory(load_config(tiny, [*WIDE, *block]), VOCABULARY, 0)
    assert some.activations == 3 * hidden + 2 * layer_activations(run)
    fp8 = stage_memory(load_config(tiny, [*WIDE, "model.fp8=true"]), VOCABULARY, 0)
    assert fp8.weights - plain.weights == 2 * 4 * (128 * (2 * 128 + 2 * 64) + 3 * 128 * 256)
    half = stage_memory(load_config(tiny, [*WIDE, *CP2]), VOCABULARY, 0)
    assert half.activations == plain.activations / 2 and half.optimizer == plain.optimizer / 2
    assert plain.overhead == 0 < min(getattr(plain, name) for name in PARTS if name != "overhead")
    gpu = stage_memory(load_config(tiny, [*WIDE, "trainer.accelerator=gpu"]), VOCABULARY, 0)
    assert gpu.overhead > OVERHEAD and gpu.total == plain.total + gpu.overhead
    assert layer_parameters(run.model) == 128 * (2 * 128 + 2 * 64) + 3 * 128 * 256 + 2 * 128


def plan_json(capsys, *arguments) -> tuple[int, dict]:
    code = main(["plan", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_tail_epochs_and_attention_come_from_the_index(tiny, capsys):
    code, result = plan_json(capsys, "--config", tiny)
    stage = result["stages"][0]
    lengths = read_index(str(tiny.parent / "x")).lengths
    census = ExposureCensus.from_document_lengths(lengths, SEQ_LENGTH, eod_mask_loss=True)
    run = load_config(tiny)
    table = WeightTable.from_census(census, run.model.exact)
    assert code == 0 and stage["exact"]["tail_share"] == pytest.approx(table.tail_share, abs=0.01)
    weights = [row["weight"] for row in stage["exact"]["buckets"]]
    assert weights == pytest.approx([row["weight"] for row in table.rows()], rel=0.01)
    assert stage["samples"] == 32 and stage["tokens"] == 32 * SEQ_LENGTH
    source = stage["data"][0]
    assert source["epochs"] == pytest.approx(32 * SEQ_LENGTH / (0.9 * lengths.sum()), rel=1e-3)

    stream = np.repeat(np.arange(len(lengths)), lengths)[: census.tokens].reshape(-1, SEQ_LENGTH)
    seen = [sum(int((row[: i + 1] == row[i]).sum()) for i in range(SEQ_LENGTH)) for row in stream]
    assert stage["flops_per_token"]["keys_seen"] == pytest.approx(sum(seen) / census.tokens)
    assert stage["flops_per_token"]["counted"] == "document by document"
    assert stage["flops_per_token"]["attention"] == pytest.approx(12 * 4 * 32 * sum(seen) / census.tokens)


def test_a_blend_is_weighted_and_missing_data_are_named(tiny, capsys):
    x = tiny.parent / "x"
    _, result = plan_json(capsys, "--config", tiny, f"model.data.data_prefix=[3,{x},1,{x}]")
    assert [row["share"] for row in result["stages"][0]["data"]] == [0.75, 0.25]
    _, both = plan_json(capsys, "--config", tiny)
    assert result["stages"][0]["exact"] == both["stages"][0]["exact"]
    _, result = plan_json(capsys, "--config", tiny, f"model.data.data_prefix=[3,{x},1,nowhere]")
    stage = result["stages"][0]
    assert stage["data"] is None and stage["data_missing"] == ["nowhere"] and stage["exact"] is None
    assert stage["flops_per_token"]["counted"] == "full causal window"


def test_a_stage_without_a_tail_is_refused_in_both_arms(tiny, capsys):
    for enabled in ("true", "false"):
        data = ["model.data.seq_length=256", "model.exact.tau=256", f"model.exact.enabled={enabled}"]
        assert main(["plan", "--config", str(tiny), *data]) == 2
        capsys.readouterr()


def test_stages_of_a_chain(capsys):
    stages = [word for name in ("4k", "8k", "16k") for word in ("--stage", f"configs/stages/{name}.yaml")]
    base = ["--config", "configs/cpt.yaml", "--config", "configs/models/llama-3.1-8b.yaml", *stages]
    code, result = plan_json(capsys, *base, "--mfu", 0.4, "trainer.max_steps=1000")
    assert code == 0 and [s["name"] for s in result["stages"]] == ["4k", "8k", "16k"]
    assert [s["seq_length"] for s in result["stages"]] == [4096, 8192, 16384] and result["fits"]
    assert result["gpu_hours"] == pytest.approx(8 * result["hours"]) == sum(s["gpu_hours"] for s in result["stages"])
    code, result = plan_json(capsys, *base, "--nodes", 1, "--gpus-per-node", 8, "--gpu-memory", 40)
    assert code == 1 and result["hours"] is None
    assert main(["plan", *base]) == 0
    assert "3 stages" in capsys.readouterr().out


def test_exit_codes(tiny, capsys):
    assert main(["plan", "--config", str(tiny), "--gpu-memory", "0.001"]) == 1
    printed = capsys.readouterr().out
    assert "TOO MUCH" in printed and "Largest: stage 0" in printed and "No time: give --mfu" in printed
    assert main(["plan", "--config", str(tiny), "--gpus-per-node", "3", "model.tensor_model_parallel_size=2"]) == 2
    assert "3 ranks" in capsys.readouterr().err
    for arguments in (["--mfu", "40"], ["--gpu-memory", "0"]):
        assert main(["plan", "--config", str(tiny), *arguments]) == 2
    assert main(["plan", "--config", str(tiny), "--mfu", "0.4"]) == 2
    assert "of what? Give --peak-tflops" in capsys.readouterr().err
    _, result = plan_json(capsys, "--config", tiny, "--nodes", 2, "--gpus-per-node", 2, *TP4)
    assert "cross nodes of 2 GPUs" in result["stages"][0]["notes"][0]


def test_time_from_a_speed(tiny, capsys):
    code, result = plan_json(
        capsys, "--config", tiny, "--tokens-per-second-per-gpu", 100, "--nodes", 2, "--gpus-per-node", 2
    )
    stage = result["stages"][0]
    assert stage["hours"] == pytest.approx(stage["tokens"] / 400 / 3600)
    assert stage["gpu_hours"] == pytest.approx(4 * stage["hours"]) and stage["speed"]["mfu"] is None
    _, result = plan_json(capsys, "--config", tiny, "--mfu", 0.5, "--peak-tflops", 100)
    stage = result["stages"][0]
    flops = stage["flops_per_token"]["total"]
    assert stage["speed"]["tokens_per_second_per_gpu"] == pytest.approx(0.5 * 100e12 / flops)
    assert stage["speed"]["mfu"] == pytest.approx(0.5)


def test_a_measured_run(tiny, measured, capsys):
    """What `train` wrote: its speed is taken over, its memory stands beside the estimate."""
    lines = [json.loads(line) for line in (measured / "fit" / "metrics.jsonl").read_text().splitlines()]
    code, result = plan_json(capsys, "--config", tiny, *WIDE, "--measured", measured / "fit")
    assert code == 0
    speed = result["stages"][0]["speed"]
    assert speed["tokens_per_second_per_gpu"] == pytest.approx(np.median([line["tokens_per_s"] for line in lines[3:]]))
    row = result["measured"]["memory"][0]
    for name in ("weights", "gradients", "optimizer"):
        estimate, found = row[name]
        assert found == pytest.approx(estimate, rel=0.02)
    assert "allocated" not in row  # a CPU has no such peak

    record = json.loads((measured / "fit" / "memory.json").read_text())
    record["ranks"][0] |= {"peak_allocated": 7 << 20, "peak_reserved": 8 << 20, "device_used": 9 << 20}
    row = planning_measured.compare_memory(load_config(measured / "fit" / "config.yaml"), record)[0]
    assert row["allocated"][1] == 7 << 20 and row["device"][1] == 9 << 20

    code, wider = plan_json(capsys, "--config", tiny, *WIDE, "model.num_layers=8", "--measured", measured / "fit")
    a, b = result["stages"][0]["speed"], wider["stages"][0]["speed"]
    assert b["tflops_per_gpu"] == pytest.approx(a["tflops_per_gpu"])
    assert main(["plan", "--config", str(tiny), *WIDE, "--measured", str(measured / "fit")]) == 0
    assert "memory of the measured run" in capsys.readouterr().out


def test_measured_takes_a_run_alone(tiny, tmp_path, capsys):
    (tmp_path / "step.json").write_text(json.dumps({"benchmark": "step"}))
    assert main(["plan", "--config", str(tiny), "--measured", str(tmp_path / "step.json")]) == 2
    assert "give the folder of a run" in capsys.readouterr().err


def test_chunked_losses_need_less_memory(tiny, capsys):
    stages = [
        plan_json(capsys, "--config", tiny, *more)[1]["stages"][0]["memory"]["stages"][-1]["logits"]
        for more in ([], ["model.loss_chunk_tokens=16"])
    ]
    assert stages[1] < stages[0]


def test_no_torch_on_a_login_node(tiny):
    code = (
        "import sys; from exact_megatron.cli import main; "
        f"code = main(['plan', '--config', {str(tiny)!r}, '--tokens-per-second-per-gpu', '9']); "
        "assert not {'torch', 'megatron'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "GPU hours" in done.stdout, done.stderr
