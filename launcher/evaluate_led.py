"""What an LED writes about held-out sources, by ROUGE, beside the first lines of the sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from haloformer.configs.schema import LedConfig, TrainConfig
from haloformer.data_pipeline.seq2seq import PairEvalStream
from haloformer.launcher.evaluators import (
    Evaluator,
    Json,
    Outcome,
    Scores,
    Work,
    dealt,
    gathered,
    mean_scores,
)
from haloformer.launcher.rouge import (
    Scorer,
    lead_of_sentences,
    lead_of_words,
    mean_rouge,
    open_scorer,
)
from haloformer.model.generate import SearchSettings, generate
from haloformer.model.led import LedForConditionalGeneration

# Two baselines: the usual three sentences, and about as many words as a lead of wiki_lead has.
_LEAD_SENTENCES, _LEAD_WORDS = 3, 200


class LedEvaluator(Evaluator):
    """ROUGE (F1, stemmed) of answers and of two lead baselines; the pairs are dealt to data ranks.

    Ranks may share a source (context parallel); a decoder that is split over tensor ranks cannot
    write, so those become data ranks.
    """

    unit: ClassVar[str] = "pairs"
    options: ClassVar[tuple[str, ...]] = ("limit", "beams", "max_length", "no_repeat_ngram_size")
    decimals: ClassVar[int] = 2
    records_key: ClassVar[str] = "pairs"
    splits_weights: ClassVar[bool] = False

    def settings(self, config: TrainConfig, options: Mapping[str, Any]) -> dict[str, Json]:
        """How to search.

        Raises:
            ValueError: If an answer may be longer than the decoder, or rouge-score is missing.
        """
        assert isinstance(config.model, LedConfig) and config.data.target_len is not None
        longest = options.get("max_length", config.data.target_len)
        limit = config.model.max_target_positions
        if longest > limit:
            raise ValueError(f"--max-length {longest} is more than the model's {limit} positions")
        chosen = {
            "max_length": longest,
            "num_beams": options.get("beams", 1),
            "no_repeat_ngram_size": options.get("no_repeat_ngram_size", 3),
        }
        SearchSettings(**chosen)  # checks them
        open_scorer()
        return {**super().settings(config, options), "search": chosen}

    def evaluate(self, model: nn.Module, work: Work) -> Outcome:
        """Answer every source, or the first ``limit``."""
        assert isinstance(model, LedForConditionalGeneration)
        stream = work.open_stream()
        assert isinstance(stream, PairEvalStream)
        specials = stream.tokenizer.specials
        search = SearchSettings(
            **work.settings["search"],
            start_token=specials.eos,
            eos_token=specials.eos,
            pad_token=specials.pad,
        )
        scorer, records = open_scorer(), []
        for number, batch, inputs in dealt(stream, self.unit, work):
            found = generate(model, inputs.input_ids, inputs.shard, search)
            if work.counts:
                source, target = stream.texts(batch.keys[0])
                answer = stream.tokenizer.decode(found[0].tolist())
                texts = {"source": source, "target": target, "answer": answer}
                records.append({"number": number, **texts, "scores": _score(scorer, **texts)})
        answered = gathered(records, work)
        if not answered:
            raise ValueError(f"{stream.index.folder}: there is no pair that can be read")
        return Outcome(len(answered), mean_scores([one["scores"] for one in answered]), answered)


def _score(scorer: Scorer, source: str, target: str, answer: str) -> Scores:
    """ROUGE of the answer and of what a reader of the first lines would write."""
    candidates = {
        "model": answer,
        f"first {_LEAD_SENTENCES} sentences": lead_of_sentences(source, _LEAD_SENTENCES),
        f"first {_LEAD_WORDS} words": lead_of_words(source, _LEAD_WORDS),
    }
    return {
        name: {**mean_rouge(scorer, [text], [target]), "words": float(len(text.split()))}
        for name, text in candidates.items()
    }
