"""lmms-eval's own models, with adapters on them and, if wanted, text between image and question.

lmms-eval --model peft_pvm_qwen3_vl --model_args pretrained=Qwen/Qwen3-VL-8B-Instruct,adapter=my-pvm+adapters/dipe ...
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from ...tuners.loading import load_adapters
from ...tuners.names import separate
from ...utils.distractors import Distractors, check_tokens, has_visuals, into_messages, read_paragraphs
from . import MISSING, TESTED


try:
    from lmms_eval.models.registry_v2 import ModelManifest
except ModuleNotFoundError as error:
    raise ImportError(f"{error}. {MISSING}") from error
from loguru import logger

from .distractors import answers_of, into_context


MODELS = ("qwen3_vl", "qwen2_5_vl", "llava_hf")  # names of lmms-eval; each is offered with the prefix
PREFIX = "peft_pvm_"
SIMPLE = "_simple"


Base: Any = object  # for mypy: at run time, one of lmms-eval's models comes after this class in the order of methods


class WithAdapters(Base):
    """What is added to a model of lmms-eval. Every other argument is the model's own.

    Args:
        adapter: Folders or Hub ids of adapters, of any of PEFT's types: a sequence, or one string with `+` between.
            All of them act together. A folder with a `+` in its name goes into a sequence only.
        distractor_tokens: Put text of this many tokens after the last image of each document; 0 for none.
        distractor_file: Text file that it is made of; by default Python's help topics.
        distractor_seed: Together with the document, it decides which paragraphs come in which order.

    Attributes:
        distractor_counts: How many tokens of text were put into each request that got any.

    Raises:
        FileNotFoundError: There is no `distractor_file`.
        RuntimeError: This version of lmms-eval loads the model in another way, so that no adapter was attached.
        ValueError: An adapter cannot be read or does not fit; a number out of range; a text that does not suffice.
    """

    is_simple: bool
    model: Any
    tokenizer: Any
    task_dict: dict[str, Any]

    def __init__(
        self,
        adapter: str | Sequence[str] = (),
        distractor_tokens: int = 0,
        distractor_file: str | os.PathLike | None = None,
        distractor_seed: int = 0,
        **kwargs: Any,
    ):
        self._adapters, self._attached = separate(adapter), False
        paragraphs: list[str] = []
        if distractor_tokens:  # checked before the model takes minutes
            check_tokens(distractor_tokens)
            paragraphs = read_paragraphs(distractor_file)
        super().__init__(**kwargs)
        if self._adapters and not self._attached:
            raise RuntimeError(
                f"The adapters {self._adapters} were not attached: {type(self).__name__} did not assign the attribute "
                f"_model, but {sorted(vars(self))}. lmms-eval {version('lmms_eval')} is installed, and {TESTED} was "
                f"tested: pip install lmms-eval=={TESTED}"
            )
        self._distractors: Distractors | None = None
        self.distractor_counts: list[int] = []
        if distractor_tokens:
            self._distractors = Distractors(self.tokenizer, distractor_tokens, paragraphs, distractor_seed)
            longest = self.model.config.get_text_config().max_position_embeddings
            if distractor_tokens >= longest:
                # Logged: some of lmms-eval's modules silence all warnings.
                logger.warning(
                    f"distractor_tokens is {distractor_tokens}, but the model was made for {longest} positions."
                )

    def __setattr__(self, name: str, value: Any) -> None:
        # lmms-eval's classes load the model and hand it to accelerate in one `__init__`; adapters belong in between.
        if name == "_model" and not self._attached:
            load_adapters(value, self._adapters)
            self._attached = True
        super().__setattr__(name, value)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answer requests, with text put into them if there is to be some."""
        if (distractors := self._distractors) is None:
            return super().generate_until(requests)
        self.distractor_counts = []
        answers = super().generate_until([self._with_distractor(request, distractors) for request in requests])
        counts = self.distractor_counts
        span = f", of {min(counts)} to {max(counts)} tokens" if counts else ""
        logger.info(f"Text was put after the image in {len(counts)} of {len(requests)} requests{span}.")
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Score given answers. Raises NotImplementedError if text is to be put into requests."""
        self._refuse_distractors("loglikelihood")
        return super().loglikelihood(requests)

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        """Answer over several rounds. Raises NotImplementedError if text is to be put into requests."""
        self._refuse_distractors("generate_until_multi_round")
        return super().generate_until_multi_round(requests)

    def _refuse_distractors(self, kind: str) -> None:
        if self._distractors is not None:
            raise NotImplementedError(
                f"distractor_tokens works on tasks of the output type generate_until, but this one asks for {kind}."
            )

    def _with_distractor(self, request: Any, distractors: Distractors) -> Any:
        changed = copy.copy(request)
        if self.is_simple:
            context, generation, to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            if to_visual(doc):
                text = self._draw(distractors, to_visual.__self__, doc, f"{task}/{split}/{doc_id}")
                context = into_context(context, text)
            changed.arguments = context, generation, to_visual, doc_id, task, split
            return changed
        context, to_messages, generation, doc_id, task, split = request.args

        def messages_with_text(doc: Any) -> list[dict[str, Any]]:
            messages = to_messages(doc)
            if not has_visuals(messages):
                return messages
            text = self._draw(distractors, to_messages.__self__, doc, f"{task}/{split}/{doc_id}")
            return into_messages(messages, text)

        changed.arguments = context, messages_with_text, generation, doc_id, task, split
        return changed

    def _draw(self, distractors: Distractors, task: Any, doc: Any, document: str) -> str:
        text = distractors.draw(document, answers_of(task, doc))
        self.distractor_counts.append(distractors.count(text))
        return text


def manifests() -> list[ModelManifest]:
    """What lmms-eval is told through the entry point `lmms_eval.models`."""
    return [
        ModelManifest(
            f"{PREFIX}{name}",
            simple_class_path=f"{__name__}.{PREFIX}{name}{SIMPLE}",
            chat_class_path=f"{__name__}.{PREFIX}{name}",
        )
        for name in MODELS
    ]


@functools.cache
def model_class(name: str, simple: bool = False) -> type[Any]:
    """A model of lmms-eval with what `WithAdapters` adds.

    Args:
        name: One of `MODELS`.
        simple: The class for tasks without chat messages.
    """
    from lmms_eval.models import get_model  # here: while lmms-eval asks for the manifests it is not there yet

    base = get_model(name, force_simple=simple)
    return type(f"{base.__name__}WithAdapters", (WithAdapters, base), {"__module__": __name__})


def __getattr__(name: str) -> type:
    """The classes of the manifests. Each is made when it is asked for: what the others import need not be there."""
    stem = name.removeprefix(PREFIX)
    if stem != name and stem.removesuffix(SIMPLE) in MODELS:
        return model_class(stem.removesuffix(SIMPLE), simple=stem.endswith(SIMPLE))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
