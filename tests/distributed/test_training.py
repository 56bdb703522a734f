"""Training on shards: the same at any number of ranks, and gone on with from its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import shardwise as sw
from shardwise.testing import RankPool
from shardwise.training import LoraSettings, TrainSettings, train
from shardwise.training.loss import summed_loss
from shardwise.training.order import DataOrder
from shardwise.training.tokens import TokenRows
from shardwise.transformers_model import facade
from tests.distributed.facade import quiet_peft
from tests.distributed.models import from_checkpoint
from tests.distributed.training import (
    MARKING,
    byte_tokenizer,
    metrics_of,
    settings,
    train_here,
    write_model,
    write_text,
)

pytestmark = pytest.mark.distributed

SAME = {"rel": 1e-4}  # of losses in float32, which are sums in another order


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("training") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def run(pool: RankPool, ranks: int, given: Any, **signals: str) -> dict[str, Any]:
    named = {key.replace("rank", "").replace("_step", " "): value for key, value in signals.items()}
    outcomes = pool.run(train_here, given.to_json(), named, ranks=ranks)
    assert all(outcome["losses"] == outcomes[0]["losses"] for outcome in outcomes)
    return outcomes[0]


def plain_figures(model: Path, rows: Path, *, steps: int) -> tuple[list[float], list[float]]:
    """Train in this process alone, with torch and transformers; return losses and norms of gradients."""
    from transformers import get_scheduler

    alone = from_checkpoint(str(model), dtype=torch.float32)
    data = TokenRows(rows)
    order = DataOrder(rows=data.summary.rows, batch_size=8, seed=5).from_step(0)
    parameters = list(alone.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=steps)
    losses, norms = [], []
    alone.train()
    for _ in range(steps):
        tokens, labels = data.batch(next(order))
        loss = alone(input_ids=tokens, labels=labels).loss  # transformers' own, a mean
        losses.append(loss.item())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return losses, norms


def test_losses_are_those_of_one_process(pool: RankPool, model: Path, text: Path, tmp_path: Path) -> None:
    first = run(pool, 1, settings(model, text, tmp_path / "1"))
    (rows,) = (tmp_path / "1" / "data").glob("[!.]*")
    expected, norms = plain_figures(model, rows, steps=6)
    assert expected[-1] < 0.9 * expected[0]
    assert first["losses"] == pytest.approx(expected, **SAME)
    for ranks, strategy, passes in ((2, "accelerate", 2), (4, "native_fsdp", 1), (4, "accelerate", 1)):
        output = tmp_path / f"{ranks}-{strategy}"
        found = run(
            pool,
            ranks,
            settings(
                model,
                text,
                output,
                strategy=strategy,
                gradient_accumulation=passes,
                reshard_after_forward=ranks == 2,
            ),
        )
        assert found["losses"] == pytest.approx(expected, **SAME)
        lines = metrics_of(output)
        assert [line["loss"] for line in lines] == found["losses"]
        assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-3)


@pytest.fixture(scope="module")
def unbroken(
    pool: RankPool, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A training of 20 steps on 4 ranks that nothing disturbed."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    return run(pool, 4, settings(model, text, output, steps=20, export=True))


def test_losses_on_few_tokens_of_some_rows_are_those_of_one_process(
    pool: RankPool, model: Path, tmp_path: Path
) -> None:
    # Rows with many tokens of the assistant and rows with none: a mean of the ranks' means would be another loss.
    shutil.copytree(model, tmp_path / "model")
    byte_tokenizer(template=MARKING).save_pretrained(tmp_path / "model")
    chats = [
        [
            {"role": "user", "content": "?" * (7 * n % 50)},
            {"role": "assistant", "content": "!" * (3 * n % 11)},
        ]
        for n in range(40)
    ]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    outputs = {}
    for ranks, passes in ((1, 1), (4, 2)):
        output = tmp_path / str(ranks)
        given = settings(tmp_path / "model", data, output, gradient_accumulation=passes, eval_fraction=0.1)
        outputs[ranks] = run(pool, ranks, given), metrics_of(output)
    one, four = outputs[1], outputs[4]
    assert any("loss on assistant tokens" in note for note in four[0]["notes"])
    assert four[0]["losses"] == pytest.approx(one[0]["losses"], **SAME)
    assert four[0]["evaluations"] == pytest.approx(one[0]["evaluations"], **SAME)
    norms = [[line["grad_norm"] for line in lines[:-1]] for _, lines in (one, four)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_a_killed_training_goes_on_at_another_number_of_ranks(
    pool: RankPool, model: Path, text: Path, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    given = settings(model, text, tmp_path, steps=20, checkpoint_every=5, keep=2)
    # As launchers do, the others are told to end when one has died.
    signals = {"3 12": "SIGKILL", "0 12": "SIGTERM", "1 12": "SIGTERM", "2 12": "SIGTERM"}
    ended = pool.run_to_errors(train_here, given.to_json(), signals, ranks=4, timeout_seconds=60)
    assert all(error is not None and "did not finish" not in str(error) for error in ended)
    checkpoints = tmp_path / "checkpoints"
    # Of the twelfth step nothing was saved.
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000005", "step-00000010"]

    options = {"steps": 20, "checkpoint_every": 10, "keep": 2, "resume": "auto", "export": True}
    found = run(pool, 2, settings(model, text, tmp_path, strategy="accelerate", **options))
    assert found["resumed_from"] == str(checkpoints / "step-00000010")
    assert found["losses"] == pytest.approx(unbroken["losses"][10:], **SAME)
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(1, 21))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000010", "step-00000020"]
    assert found["storage_bytes"] == 0  # of the base
    exported, expected = (load_file(Path(each["export"]) / "model.safetensors") for each in (found, unbroken))
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():  # 20 steps of up to 0.01
        torch.testing.assert_close(
            exported[name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_what_is_not_whole_is_refused_and_the_one_before_it_used(
    pool: RankPool, model: Path, text: Path, tmp_path: Path
) -> None:
    given = settings(model, text, tmp_path, steps=4, checkpoint_every=1)
    expected = run(pool, 2, given)["losses"]
    folder = tmp_path / "checkpoints"
    (folder / "step-00000004" / "run.json").unlink()
    damaged = next((folder / "step-00000003").glob("__1_*"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    cut_short = next((folder / "step-00000002").glob("__0_*"))
    cut_short.write_bytes(cut_short.read_bytes()[:-1])

    found = run(pool, 2, settings(model, text, tmp_path, steps=4, checkpoint_every=1, resume="auto"))
    assert found["losses"] == pytest.approx(expected[1:], **SAME)
    refused = [note for note in found["notes"] if "is refused" in note]
    assert "step-00000004 is refused" in refused[0]
    assert "half-written: it has no run.json" in refused[0]
    assert "its contents are not those that were written. Going on from the one before it." in refused[1]
    assert "bytes, got" in refused[2]
    assert "going on from step 1 of 4" in str(found["notes"])
    # Those that were refused have been written anew.
    assert run(pool, 1, settings(model, text, tmp_path, steps=4, resume="auto"))["step"] == 4

    (folder / "step-00000004" / "training.pt").unlink()
    for problem, changed in (
        (
            "expected a whole checkpoint: .*training.pt: No such file",
            {"resume": str(folder / "step-00000004")},
        ),
        ("expected no checkpoints, got step-00000004. Give --resume auto", {}),
        ("seed 5, got 6.*Give the same", {"resume": "auto", "seed": 6}),
    ):
        errors = pool.run_to_errors(
            train_here, settings(model, text, tmp_path, steps=4, **changed).to_json(), ranks=1
        )
        assert isinstance(errors[0], sw.ShardwiseError)
        with pytest.raises(sw.ShardwiseError, match=problem):
            raise errors[0]
    for path in folder.iterdir():
        shutil.rmtree(path) if path.name == "step-00000001" else (path / "run.json").write_text("{")
    errors = pool.run_to_errors(
        train_here, settings(model, text, tmp_path, steps=4, resume="auto").to_json(), ranks=2
    )
    for error in errors:
        with pytest.raises(
            sw.CheckpointError, match=r"got none: .*step-00000004.*remove these to begin anew"
        ):
            raise error or AssertionError
    assert len(list(folder.glob("step-0000000?"))) == 3


def test_on_sigterm_all_ranks_save_and_return(
    pool: RankPool, model: Path, text: Path, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    given = settings(model, text, tmp_path, steps=20)
    stopped = run(pool, 2, given, rank1_step3="SIGTERM")
    assert stopped["stopped"]
    assert stopped["step"] == 4  # the signal came after the third step's end
    assert stopped["checkpoint"] == str(tmp_path / "checkpoints" / "step-00000004")
    found = run(pool, 4, settings(model, text, tmp_path, steps=20, resume="auto", async_checkpoints=True))
    assert not found["stopped"]
    assert found["losses"] == pytest.approx(unbroken["losses"][4:], **SAME)


def test_a_training_that_is_stopped_at_its_last_step_is_saved(
    pool: RankPool, model: Path, text: Path, tmp_path: Path
) -> None:
    options = {"steps": 3, "eval_fraction": 0.2}
    stopped = run(pool, 1, settings(model, text, tmp_path, **options), rank0_step2="SIGTERM")
    assert (stopped["step"], stopped["stopped"], stopped["evaluations"]) == (3, True, [])
    ended = run(pool, 1, settings(model, text, tmp_path, **options, resume="auto"))
    assert (ended["step"], ended["stopped"], ended["losses"]) == (3, False, [])
    assert len(ended["evaluations"]) == 1


def test_sigterm_is_heard_between_steps_too(pool: RankPool, model: Path, text: Path, tmp_path: Path) -> None:
    options = {"steps": 4, "eval_fraction": 0.2, "eval_every": 2, "checkpoint_every": 2, "export": True}

    def stopped(ranks: int, **signals: str) -> tuple[Any, ...]:
        found = run(pool, ranks, settings(model, text, tmp_path, **options, resume="auto"), **signals)
        checkpoint = found["checkpoint"] and Path(found["checkpoint"]).name
        return found["stopped"], found["step"], len(found["evaluations"]), checkpoint, found["export"]

    # The checkpoint that is due is written before the evaluation, which does not begin then.
    assert stopped(2, rank1_step2_save="SIGTERM") == (True, 2, 0, "step-00000002", None)
    assert stopped(2, rank0_step4_save="SIGTERM") == (True, 4, 0, "step-00000004", None)
    assert stopped(1, rank0_step4_eval="SIGTERM") == (True, 4, 1, "step-00000004", None)
    assert stopped(1) == (False, 4, 1, "step-00000004", str(tmp_path / "export"))


def test_a_stopped_evaluation_has_no_loss_and_its_step_is_saved(
    pool: RankPool, model: Path, text: Path, tmp_path: Path
) -> None:
    given = settings(model, text, tmp_path, steps=2, eval_fraction=0.5)
    for passes, outcome in pool.run(train_until_the_second_pass, given.to_json(), ranks=2):
        assert (passes, outcome["eval_loss"]) == (1, None)
        assert (outcome["step"], outcome["stopped"]) == (2, True)
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2]
    assert (tmp_path / "checkpoints" / "step-00000002" / "run.json").is_file()


def train_until_the_second_pass(given: Any) -> tuple[int, dict[str, Any]]:
    """Train, and be told to end in the evaluation's first pass; return how many passes it had."""
    plain, passes = sw.TransformersModel.forward_only, 0

    def forward_only(self: sw.TransformersModel, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sw.TransformersModel, "forward_only", forward_only)
        outcome = train(TrainSettings.from_json(given), report=lambda event: None)
    return passes, outcome


def test_checkpoints_are_written_while_training_goes_on(
    pool: RankPool, model: Path, text: Path, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    given = settings(model, text, tmp_path, steps=20, checkpoint_every=3, async_checkpoints=True)
    stopped = run(pool, 2, given, rank0_step7="SIGTERM")
    folder = tmp_path / "checkpoints"
    names = [f"step-{step:08d}" for step in (3, 6, 8)]
    assert sorted(path.name for path in folder.iterdir()) == names
    shutil.rmtree(folder / names[2])  # go on from one that was written meanwhile
    again = settings(model, text, tmp_path, steps=20, activation_checkpointing=True, resume="auto")
    found = run(pool, 4, again)
    assert found["losses"] == pytest.approx(unbroken["losses"][6:], **SAME)
    assert stopped["losses"] == pytest.approx(unbroken["losses"][:8], **SAME)


def test_a_lora_adapter_is_trained_exported_and_gone_on_with(
    pool: RankPool, model: Path, text: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    lora = LoraSettings(rank=4, alpha=8.0, dropout=0.0, targets=("q_proj", "v_proj"))
    options = {"lora": lora, "dtype": "auto", "checkpoint_every": 3, "eval_fraction": 0.1, "export": True}
    one = run(pool, 1, settings(model, text, tmp_path / "1", **options))
    two = run(pool, 2, settings(model, text, tmp_path / "2", strategy="accelerate", **options))
    assert two["losses"] == pytest.approx(one["losses"], **SAME)
    assert two["losses"][-1] < two["losses"][0]
    assert two["evaluations"] == pytest.approx(one["evaluations"], **SAME)

    shutil.rmtree(tmp_path / "2" / "checkpoints" / "step-00000006")
    again = run(pool, 1, settings(model, text, tmp_path / "2", **options, resume="auto"))
    assert again["losses"] == pytest.approx(one["losses"][3:], **SAME)
    assert again["storage_bytes"] == 0

    with quiet_peft():
        with_adapter = peft.PeftModel.from_pretrained(from_checkpoint(str(model)), again["export"]).eval()
    data = TokenRows(Path(again["rows"]))
    held_out = list(range(data.summary.rows - -(-data.summary.rows // 10), data.summary.rows))
    tokens, labels = data.batch(held_out)
    with torch.no_grad():
        loss = summed_loss(with_adapter(input_ids=tokens).logits, labels) / data.predicted(held_out)
    assert loss.item() == pytest.approx(again["eval_loss"], **SAME)


def test_the_export_is_the_trained_model(pool: RankPool, model: Path, text: Path, tmp_path: Path) -> None:
    given = settings(
        model, text, tmp_path, steps=3, eval_fraction=0.2, eval_every=1, dtype="bfloat16", export=True
    )
    found = run(pool, 4, given)
    assert len(found["evaluations"]) == 3
    exported = from_checkpoint(found["export"], dtype=torch.float32)
    data = TokenRows(Path(found["rows"]))
    held_out = list(range(data.summary.rows - -(-data.summary.rows // 5), data.summary.rows))
    tokens, labels = data.batch(held_out)
    with torch.no_grad():
        loss = summed_loss(exported(input_ids=tokens).logits, labels) / data.predicted(held_out)
    assert loss.item() == pytest.approx(found["eval_loss"], rel=1e-2)  # which was computed in bf16
    assert (Path(found["export"]) / "tokenizer.json").is_file()


def test_results_of_another_training_are_replaced_only_when_asked(
    pool: RankPool, model: Path, text: Path, tmp_path: Path
) -> None:
    options = {"steps": 2, "export": True}
    run(pool, 2, settings(model, text, tmp_path, **options))
    metrics, weights = tmp_path / "metrics.jsonl", tmp_path / "export" / "model.safetensors"
    before = metrics.read_bytes(), weights.read_bytes()
    for changed, problem in (
        ({}, "export: expected a directory that is empty or not there, got one with files"),
        ({"resume": "auto"}, "export: expected a directory that is empty or not there, got one with files"),
        ({"export": False}, r"metrics\.jsonl: expected no figures, got those of another training"),
    ):
        given = settings(model, text, tmp_path, **{**options, "seed": 6, **changed})
        errors = pool.run_to_errors(train_here, given.to_json(), ranks=2)
        with pytest.raises(sw.ShardwiseError, match=problem):
            raise errors[0] or AssertionError
        assert isinstance(errors[1], sw.PeerError)
        assert (metrics.read_bytes(), weights.read_bytes()) == before
    run(pool, 2, settings(model, text, tmp_path, **options, seed=6, overwrite=True))
    assert metrics.read_bytes() != before[0]
    assert weights.read_bytes() != before[1]


def test_a_training_whose_export_fails_is_saved(
    pool: RankPool, model: Path, text: Path, tmp_path: Path
) -> None:
    given = settings(model, text, tmp_path, steps=2, export=True)
    (tmp_path / "export").mkdir()
    notes = tmp_path / "notes"
    for error in pool.run_to_errors(train_with_the_export_blocked, given.to_json(), str(notes), ranks=2):
        with pytest.raises(sw.ShardwiseError, match="expected a directory that is empty or not there"):
            raise error or AssertionError
    saved = tmp_path / "checkpoints" / "step-00000002"
    assert f"The export failed. The training is saved as {saved}: --resume auto" in notes.read_text()
    found = run(pool, 1, settings(model, text, tmp_path, steps=2, export=True, resume="auto"))
    assert (found["losses"], found["resumed_from"]) == ([], str(saved))
    assert (tmp_path / "export" / "model.safetensors").is_file()


def train_with_the_export_blocked(given: Any, notes: str) -> None:
    """Train, and put a file where the export goes once it has begun."""

    def report(event: Any) -> None:
        if dist.get_rank() == 0 and event["kind"] == "note":
            with Path(notes).open("a") as file:
                file.write(event["text"])
            if event["text"].startswith("writing /"):
                (Path(given["output_directory"]) / "export" / "config.json").touch()

    train(TrainSettings.from_json(given), report=report)


def test_a_training_that_diverges_ends_and_writes_no_more(
    pool: RankPool, model: Path, text: Path, tmp_path: Path
) -> None:
    options = {"learning_rate": 1e30, "warmup_steps": 0, "checkpoint_every": 1, "export": True}
    errors = pool.run_to_errors(train_here, settings(model, text, tmp_path, **options).to_json(), ranks=2)
    taken = len(metrics_of(tmp_path))
    for error in errors:
        with pytest.raises(
            sw.DivergedError, match=f"step {taken + 1}: expected a finite loss .*nan: the training"
        ):
            raise error or AssertionError
    saved = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(saved) == [f"step-{step:08d}" for step in range(1, taken + 1)]
    assert not (tmp_path / "export").exists()


def test_the_first_rank_alone_reads_the_tokenizer(
    pool: RankPool, model: Path, text: Path, tmp_path: Path
) -> None:
    given = settings(model, text, tmp_path, steps=1, export=True).to_json()
    assert pool.run(tokenizers_read, given, ranks=2) == [1, 0]
    assert (tmp_path / "export" / "tokenizer.json").is_file()


def tokenizers_read(given: Any) -> int:
    """Train, and return how often this rank has read the tokenizer."""
    plain, count = facade.load_tokenizer, 0

    def load_tokenizer(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return plain(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facade, "load_tokenizer", load_tokenizer)
        train(TrainSettings.from_json(given), report=lambda event: None)
    return count


def test_data_that_does_not_fit_is_refused(pool: RankPool, model: Path, text: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("token*"))
    for changed, problem in (
        ({"model": str(bare)}, "bare: expected a tokenizer beside the model, got none"),
        ({"data": str(tmp_path / "none.jsonl")}, r"none\.jsonl: expected a file of training data"),
        ({"batch_size": 4096}, r"at least one step's rows \(4096\)"),
    ):
        given = dataclasses.replace(settings(model, text, tmp_path / "out"), **changed)
        errors = pool.run_to_errors(train_here, given.to_json(), ranks=2)
        assert isinstance(errors[0], sw.ShardwiseError)
        assert "tokenizer" not in problem or isinstance(errors[1], sw.PeerError)
        with pytest.raises(sw.ShardwiseError, match=problem):
            raise errors[0]
