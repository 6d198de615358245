"""transformers -> ours -> three steps on two sharded ranks -> transformers."""

import pytest
import torch
import transformers

import hf_peers
from dist import run_ranks
from round_trip_ranks import train_and_export


@pytest.mark.parametrize("kind", ["longformer", "led"])
def test_training_here_and_there_agree(kind, tmp_path):
    torch.manual_seed(0)
    batch = hf_peers.batch([32, 21, 9], [[0, 17], [0], []])
    if kind == "longformer":
        config = transformers.LongformerConfig(**hf_peers.LONGFORMER)
        cls = transformers.LongformerForMaskedLM
        labels = torch.where((batch[0] % 3 == 0) & batch[1].bool(), batch[0], -100)
    else:
        config = transformers.LEDConfig(**hf_peers.LED)
        cls = transformers.LEDForConditionalGeneration
        labels, real, _ = hf_peers.batch([8, 5, 2], [], seed=4)
        labels[real == 0] = -100
    peer = hf_peers.scrambled(cls(config)).train()
    peer.save_pretrained(tmp_path / "start")
    answers = run_ranks(
        2, train_and_export, str(tmp_path / "start"), str(tmp_path / "end"), batch, labels
    )
    ids, mask, chosen = batch
    call = {"input_ids": ids, "attention_mask": mask, "global_attention_mask": chosen}
    optimizer = torch.optim.SGD(peer.parameters(), lr=0.01)
    for _ in range(3):
        peer(**call, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    exported = cls.from_pretrained(tmp_path / "end").eval()
    with torch.no_grad():
        there = exported(**call, labels=labels).logits
        trained = peer.eval()(**call, labels=labels).logits
        start = cls.from_pretrained(tmp_path / "start").eval()(**call, labels=labels).logits
    assert hf_peers.relative_error(answers[0], there) < 1e-5
    assert hf_peers.relative_error(there, trained) < 1e-4
    assert hf_peers.relative_error(there, start) > 1e-2
