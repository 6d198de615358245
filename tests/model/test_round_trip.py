"""transformers -> ours -> three steps on two sharded ranks -> transformers."""

import pytest
import torch
import transformers

import hf_peers
from dist import run_ranks
from round_trip_ranks import train_and_export

LONGFORMER = {
    "vocab_size": hf_peers.VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 70,
    "attention_window": [4, 8],
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LED = {
    "vocab_size": hf_peers.VOCAB,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 32,
    "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 40,
    "attention_window": [4, 8],
    "dropout": 0.0,
}


@pytest.mark.parametrize("kind", ["longformer", "led"])
def test_training_here_and_there_agree(kind, tmp_path):
    torch.manual_seed(0)
    batch = hf_peers.batch([32, 21, 9], [[0, 17], [0], []])
    if kind == "longformer":
        config = transformers.LongformerConfig(**LONGFORMER)
        cls = transformers.LongformerForMaskedLM
        labels = torch.where((batch[0] % 3 == 0) & batch[1].bool(), batch[0], -100)
    else:
        config = transformers.LEDConfig(**LED)
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
