"""exact_megatron.reporting.census and exact_megatron.commands.compare, without training anything."""

import json

import numpy as np
import pytest

from exact_megatron import ExactConfig, ExposureCensus, WeightTable
from exact_megatron.reporting import census as room
from exact_megatron.reporting import comparison_report, style

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("omegaconf")

SEQ_LENGTH = 64
BUCKETS = ["0-7", "8-15", "16-31", "32-64"]


def tiny(**settings):
    """A window of 64 tokens, with counts of 10 a target up to l = 31 and 3 beyond."""
    counts = np.where(np.arange(SEQ_LENGTH + 1) < 32, 10, 3)
    census = ExposureCensus(counts, SEQ_LENGTH, samples=7)
    return census, WeightTable.from_census(census, ExactConfig(**settings))


def assert_picture(path, least=300):
    """A PNG of some size with more than its background on it."""
    import matplotlib.image

    pixels = matplotlib.image.imread(path)
    height, width = pixels.shape[:2]
    assert height > least and width > least
    shades = np.unique(np.round(pixels[..., 0] * 255))
    ink = (pixels[..., :3] < 0.9).any(axis=2).mean()
    assert len(shades) > 20 and 0.01 < ink < 0.9


def test_census_json_is_the_weight_table_in_plain_values():
    census, table = tiny(gamma=0.5)
    facts = json.loads(json.dumps(room.census_json(census, table)))
    assert facts["seq_length"] == 64 and facts["tau"] == 16
    assert facts["samples"] == 7 and facts["tokens"] == 448
    assert [f"{b['low']}-{b['high']}" for b in facts["buckets"]] == BUCKETS
    assert [b["targets"] for b in facts["buckets"]] == [80, 80, 160, 99]
    assert sum(b["share"] for b in facts["buckets"]) == pytest.approx(1)
    assert sum(b["weighted_share"] for b in facts["buckets"]) == pytest.approx(1)
    assert facts["tail_share"] == pytest.approx(259 / 419)
    assert facts["weighted_tail_share"] == pytest.approx(259 * 1.15 / (160 + 259 * 1.15))
    assert facts["digest"] == table.digest and facts["census_digest"] == census.digest
    assert (facts["alpha"], facts["gamma"], facts["eps"]) == (0.15, 0.5, 1e-8)
    assert facts["normalization"] == "corpus"


def test_printed_census_has_every_bucket_marks_the_tail_and_adds_up(capsys):
    census, table = tiny()
    room.print_census(census, table)
    out = capsys.readouterr().out
    assert "\x1b" not in out  # no terminal, no escape codes
    rows = {cells[1].strip(): cells for cells in (line.split("│") for line in out.splitlines()) if len(cells) > 5}
    assert rows["16 - 31"][2].strip() == "160" and rows["16 - 31"][6].strip() == "tail"
    assert rows["8 - 15"][6].strip() == "" and rows["32 - 64"][6].strip() == "tail"
    assert rows["32 - 64"][4].strip() == f"{table.rows()[3]['weight']:.4f}"
    assert "38.2 % of the loss mass lies below l = 16 (tau); with the weights 34.9 %." in out
    assert "Budget: 15.0 % more supervision" in out and "alpha 0.15)" in out
    assert census.digest in out and table.digest in out


def test_printed_census_says_what_a_cap_and_an_uneven_tau_do(capsys):
    census, table = tiny(tau=20, max_weight=1.1, normalization="none")
    room.print_census(census, table)
    out = capsys.readouterr().out
    assert "below l = 32 (the first bucket from tau = 20 on)" in out
    assert "Budget: 10.0 % more" in out and "alpha 0.15, capped by max_weight 1.1" in out
    assert "divided by" not in out


@pytest.mark.parametrize(
    "settings", [{}, {"tau": 0}, {"tau": 8}, {"tau": 32}, {"alpha": 0.0}, {"max_weight": 1.1}], ids=str
)
def test_census_picture(tmp_path, settings):
    census, table = tiny(**settings)
    room.plot_census(census, table, tmp_path / "census.png")
    assert_picture(tmp_path / "census.png")


def test_census_picture_of_a_long_window_and_of_empty_buckets(tmp_path):
    counts = np.zeros((1 << 17) + 1, np.int64)
    counts[:50_000:7] = 1
    table = WeightTable.from_counts(counts, 1 << 17, tau=64)
    room.draw_census(table.rows(), 64, tmp_path / "long.png")
    assert_picture(tmp_path / "long.png")


@pytest.mark.parametrize(
    "low, high, label",
    [
        (0, 7, "0–7"),
        (512, 1023, "512–1023"),
        (512, 1024, "512–1024"),
        (1024, 2047, "1K–2K"),
        (8192, 16384, "8K–16K"),
        (4096, 6000, "4K–6000"),
    ],
)
def test_bucket_label(low, high, label):
    assert style.bucket_label(low, high) == label


def config_of(folder, run, **model):
    window = 16 if run == "base" else SEQ_LENGTH
    return {
        "restore_from_path": None if run == "base" else f"{folder}/base",
        "trainer": {"max_steps": 12, "devices": 2, "num_nodes": 1, "precision": "32"},
        "exp_manager": {"exp_dir": f"{folder}/{run}"},
        "model": {
            "micro_batch_size": 1,
            "global_batch_size": 2 * SEQ_LENGTH // window,
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 1,
            "context_parallel_size": 1,
            "sequence_parallel": True,
            "seed": 5,
            "data": {"seq_length": window},
            "exact": {
                "enabled": run == "exact",
                "alpha": 0.15,
                "gamma": 0.5,
                "tau": None,
                "normalization": "corpus",
            },
            **model,
        },
    }


LOSSES = {"base": 4.4321, "baseline": 3.9876, "exact": 3.9765}
BUCKET_LOSSES = {"baseline": [4.1, 4.0, 3.95, 3.9123], "exact": [4.2004, 4.0, 3.93, None]}


def hand_made(folder, losses=BUCKET_LOSSES):
    """Files of a finished comparison, as the native runner writes them."""
    census, table = tiny()
    folder.mkdir(exist_ok=True)
    for run in ("base", "baseline", "exact"):
        where = folder / run
        where.mkdir()
        (where / "config.yaml").write_text(json.dumps(config_of(folder, run)))  # JSON is YAML
        speed = {"base": 50.0, "baseline": 1000.0, "exact": 950.0}[run]
        with (where / "metrics.jsonl").open("w") as stream:
            for step in range(1, 13):
                loss = LOSSES[run] + 1 / step
                line = {"step": step, "lm_loss": loss, "tokens": 128 * step, "targets": 128}
                line["exact_loss"] = loss + 0.01 * (run == "exact")
                stream.write(json.dumps({**line, "tokens_per_s": 1.0 if step < 6 else speed}) + "\n")
        values = losses.get(run, [4.5] * 4)
        buckets = {b: {"loss": loss, "targets": 10 * (i + 1)} for i, (b, loss) in enumerate(zip(BUCKETS, values))}
        lines = [{"step": s, "validation_loss": LOSSES[run] + 12 - s, "buckets": buckets} for s in (6, 12)]
        (where / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = {"census": census.digest, "digest": table.digest, "buckets": table.rows()}
    (folder / "exact" / "weights.json").write_text(json.dumps(weights))
    proof = {"samples": "0 to 1", "tokens": "70ce75", "weight table": table.digest, "loss mask of exact": "ma5c"}
    (folder / "arms.json").write_text(json.dumps(proof))
    facts = {"command": "exact-megatron compare --config a.yaml 'x=a|b'", "torch": "2.99", "CPU": "abacus"}
    (folder / "comparison.json").write_text(json.dumps({**facts, "parameters": 1234567}))
    return census, table


def cells(text, first):
    """Cells of the Markdown table rows that start with `first`."""
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(f"| {first} |")]


def test_report_repeats_the_numbers_of_the_runs(tmp_path, capsys):
    census, table = hand_made(tmp_path / "pair")
    path = comparison_report.write_report(tmp_path / "pair")
    text = path.read_text()
    assert path == tmp_path / "pair" / "report.md"
    assert cells(text, "0-7")[0] == ["0-7", "10", "4.1000", "4.2004", "+0.1004", ""]
    assert cells(text, "16-31")[0] == ["16-31", "30", "3.9500", "3.9300", "-0.0200", "tail"]
    assert cells(text, "32-64")[0] == ["32-64", "40", "3.9123", "-", "-", "tail"]
    assert cells(text, "all") == [["all", "100", "3.9876", "3.9765", "-0.0111", ""]]
    for row in table.rows():
        shown = cells(text, f"{row['low']}-{row['high']}")[1]
        assert shown[1:4] == [str(row["targets"]), f"{100 * row['share']:.1f} %", f"{row['weight']:.4f}"]
    assert f"`{census.digest}`" in text and f"`{table.digest}`" in text
    assert "On the first batch of both arms: samples 0 to 1, tokens 70ce75, loss mask of exact ma5c." in text
    assert "a model of 1,234,567 parameters, trained on 1,536 tokens at a window of 16" in text
    assert "4.4321" in text  # the base's own held-out loss
    assert "baseline 1,000 tokens/s" in text and "EXACT 950 tokens/s" in text and "baseline 0.950" in text
    assert f"baseline {LOSSES['baseline'] + 1 / 12:.4f}, EXACT {LOSSES['exact'] + 1 / 12:.4f}" in text
    assert cells(text, "CPU") == [["CPU", "abacus"]] and cells(text, "torch") == [["torch", "2.99"]]
    assert "x=a\\|b" in text
    assert "## What this run can and cannot show" in text
    for name in ("heldout", "training", "census"):
        assert f"({name}.png)" in text
        assert_picture(tmp_path / "pair" / f"{name}.png")
    out = capsys.readouterr().out
    assert "+0.1004" in out and "3.9765" in out and "tail" in out and "0.950" in out


def test_report_without_facts_leaves_out_what_it_does_not_know(tmp_path, capsys):
    hand_made(tmp_path / "pair")
    (tmp_path / "pair" / "comparison.json").unlink()
    text = comparison_report.write_report(tmp_path / "pair", quiet=True).read_text()
    assert "None" not in text and "`base` is a model, trained on 1,536 tokens" in text
    assert not cells(text, "CPU")
    assert capsys.readouterr().out == ""


def rewrite(path, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "base" / "validation.jsonl").unlink(), "validation.jsonl does not exist"),
        (lambda f: (f / "arms.json").unlink(), "arms.json does not exist"),
        (
            lambda f: rewrite(f / "exact" / "metrics.jsonl", lambda x: x.update(exact_loss=x["lm_loss"])),
            "its loss is weighted in 0 of 12 steps",
        ),
        (
            lambda f: rewrite(f / "baseline" / "metrics.jsonl", lambda x: x.update(exact_loss=9.0)),
            "should be the baseline, and has the weight table None, and its loss is weighted from step 1",
        ),
        (lambda f: (f / "baseline" / "weights.json").write_text('{"digest": "d1"}'), "has the weight table d1: remove"),
        (
            lambda f: (f / "exact" / "weights.json").write_text('{"digest": "d1"}'),
            "it has d1, and its loss is weighted in 12",
        ),
        (
            lambda f: rewrite(f / "exact" / "metrics.jsonl", lambda x: x.update(step=x["step"] - 1)),
            "reach step 12",
        ),
        (
            lambda f: rewrite(f / "exact" / "metrics.jsonl", lambda x: x.update(targets=127)),
            "trained on different",
        ),
        (
            lambda f: rewrite(f / "exact" / "validation.jsonl", lambda x: x["buckets"]["0-7"].update(targets=9)),
            "measured on different",
        ),
        (
            lambda f: (f / "exact" / "config.yaml").write_text(json.dumps(config_of(f, "exact", seed=6))),
            "differences are: model.seed",
        ),
        (
            lambda f: (f / "exact" / "config.yaml").write_text(json.dumps(config_of(f, "baseline"))),
            "it is False and False",
        ),
    ],
    ids=[
        "missing",
        "unproved",
        "unweighted",
        "weighted baseline",
        "weighted baseline data",
        "other table",
        "unfinished",
        "trained",
        "measured",
        "seed",
        "unweighted",
    ],
)
def test_report_refuses_runs_that_are_no_pair(tmp_path, spoil, message):
    hand_made(tmp_path / "pair")
    spoil(tmp_path / "pair")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        comparison_report.write_report(tmp_path / "pair", quiet=True)


def test_markdown_table():
    rows = [["task", "n", ""], ["a|b", 3, "tail"]]
    assert style.markdown_table(rows) == "| task | n |  |\n| --- | ---: | ---: |\n| a\\|b | 3 | tail |"
    assert style.markdown_table(rows, left=[0, 2]).splitlines()[1] == "| --- | ---: | --- |"
