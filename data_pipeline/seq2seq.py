"""The streams of pairs: see ``sample_stream``."""

from __future__ import annotations

from typing import ClassVar

from haloformer.configs.schema import DataConfig
from haloformer.data_pipeline.index import Content
from haloformer.data_pipeline.pairs import PairBatch, PairKey, PairMaker, PairRow
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.sample_stream import SampleEvalStream, SampleTrainStream
from haloformer.data_pipeline.tokenizers import Tokenizer


def _maker(
    reader: ShardReader, tokenizer: Tokenizer, config: DataConfig, pad_multiple: int
) -> PairMaker:
    assert config.target_len is not None, "checked with the recipe"
    return PairMaker(
        reader,
        tokenizer.specials,
        target_len=config.target_len,
        pad_multiple=pad_multiple,
        has_globals=config.global_tokens == "first",
    )


class PairTrainStream(SampleTrainStream[PairRow, PairBatch]):
    """This rank's part of every global batch of pairs, for ever: see ``RankStream``.

    The recipe's data section needs ``target_len``. A damaged pair that is skipped becomes padding.
    """

    content: ClassVar[Content] = "pairs"

    def _maker(self, reader: ShardReader, tokenizer: Tokenizer) -> PairMaker:
        return _maker(reader, tokenizer, self._config, self._pad_multiple)


class PairEvalStream(SampleEvalStream[PairRow, PairBatch]):
    """Held-out pairs in stored order, each once: see ``HeldOutStream``."""

    content: ClassVar[Content] = "pairs"

    def _maker(self, reader: ShardReader, tokenizer: Tokenizer) -> PairMaker:
        return _maker(reader, tokenizer, self._config, self._pad_multiple)

    def texts(self, key: PairKey) -> tuple[str, str]:
        """Source and target of a pair as they were written, not cut."""
        pairs = self._corpus
        num_source, num_tokens = pairs.reader.pair_lengths(key.shard, key.sample)
        parts = ((0, num_source), (num_source, num_tokens))
        source, target = (
            pairs.tokenizer.decode(pairs.reader.read(key.shard, key.sample, *part).tolist())
            for part in parts
        )
        return source, target
