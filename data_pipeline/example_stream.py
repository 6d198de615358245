"""The streams of annotated examples: see ``sample_stream`` for their order and ``examples``."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from haloformer.configs.schema import DataConfig
from haloformer.data_pipeline.example_rows import ExampleMaker, Ints
from haloformer.data_pipeline.examples import ExampleBatch, ExampleContent, ExampleKey, ExampleRow
from haloformer.data_pipeline.index import Content
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.sample_stream import SampleEvalStream, SampleTrainStream
from haloformer.data_pipeline.tokenizers import Tokenizer


def _maker(
    reader: ShardReader, tokenizer: Tokenizer, config: DataConfig, pad_multiple: int
) -> ExampleMaker:
    content = cast(ExampleContent, reader.index.content)  # the stream's own: it was checked
    return ExampleMaker(
        reader,
        tokenizer.specials,
        content,
        pad_multiple=pad_multiple,
        has_globals=config.global_tokens == "first" and content != "coreference",
    )


class ExampleTrainStream(SampleTrainStream[ExampleRow, ExampleBatch]):
    """This rank's part of every global batch of examples, for ever: see ``RankStream``.

    ``facts.labels`` names the classes of a classification.
    """

    def _maker(self, reader: ShardReader, tokenizer: Tokenizer) -> ExampleMaker:
        return _maker(reader, tokenizer, self._config, self._pad_multiple)


class ExampleEvalStream(SampleEvalStream[ExampleRow, ExampleBatch]):
    """Held-out examples in stored order, each once: see ``HeldOutStream``.

    ``index.labels`` names the classes of a classification.
    """

    def _maker(self, reader: ShardReader, tokenizer: Tokenizer) -> ExampleMaker:
        return _maker(reader, tokenizer, self._config, self._pad_multiple)

    def annotation(self, key: ExampleKey) -> dict[str, Any]:
        """What is known of an example; tokens are those of its row before it is cut.

        Always ``id``. Classification: ``label``, a name. Questions: ``answers``, texts that are
        right, and ``answer_tokens``, [first, last] of each occurrence; of TriviaQA also
        ``document``. Choices: ``label``, number of the right candidate. Coreference: ``clusters``,
        lists of [first, last].

        Raises:
            CorruptSampleError: If it is not what was written.
        """
        return self._maker_of_all.annotation(key)

    def token_ids(self, key: ExampleKey) -> Ints:
        """Ids of an example's row before it is cut, int64 [n]."""
        return self._maker_of_all.whole_row(key)

    def texts(self, key: ExampleKey) -> list[str]:
        """The texts of an example as they were written: question and text, and so on."""
        segments = self._maker_of_all.segments(key)
        return [self.tokenizer.decode(ids.tolist()) for ids in segments]

    def span_text(self, key: ExampleKey, first: int, last: int) -> str:
        """The text of tokens first to last of an example's row, without blanks around it."""
        return self.tokenizer.decode(self.token_ids(key)[first : last + 1].tolist()).strip()

    @property
    def _maker_of_all(self) -> ExampleMaker:
        return cast(ExampleMaker, self._corpus.maker)


class ClassificationTrainStream(ExampleTrainStream):
    """Texts and their class."""

    content: ClassVar[Content] = "classification"


class ClassificationEvalStream(ExampleEvalStream):
    """Texts and their class."""

    content: ClassVar[Content] = "classification"


class QuestionsTrainStream(ExampleTrainStream):
    """Questions, texts, and where the answers are."""

    content: ClassVar[Content] = "questions"


class QuestionsEvalStream(ExampleEvalStream):
    """Questions, texts, and where the answers are."""

    content: ClassVar[Content] = "questions"


class ChoicesTrainStream(ExampleTrainStream):
    """Questions, candidates, documents, and which candidate is right."""

    content: ClassVar[Content] = "choices"


class ChoicesEvalStream(ExampleEvalStream):
    """Questions, candidates, documents, and which candidate is right."""

    content: ClassVar[Content] = "choices"


class CoreferenceTrainStream(ExampleTrainStream):
    """Texts, and which of their spans name the same thing."""

    content: ClassVar[Content] = "coreference"


class CoreferenceEvalStream(ExampleEvalStream):
    """Texts, and which of their spans name the same thing."""

    content: ClassVar[Content] = "coreference"
