"""Methods that go from token to token while an answer is written, as loops of whole forwards without a cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from forwards import in_double, logits
from oracle import Tokens, oracle
from tiny_vlms import IMAGE, VIDEO, TinyVLM

from peft_pvm import SAVAAConfig, SPARCConfig
from peft_pvm.tokens.families import find_vlm
from peft_pvm.utils.packages import CACHE


@dataclass(frozen=True)
class Stepwise:
    """A method of this kind.

    Attributes:
        loop: Gives the logits of one conversation, `(seq_len, vocab_size)`, by its model, the settings, the inputs
            and where it is cut into pieces that are read one after the other, both ends included.
        config: Strong settings.
        other: Other ones.
        off: Those with which it changes nothing.
        always: Whether it changes every answer about an image.
    """

    loop: Callable[[TinyVLM, Any, dict[str, torch.Tensor], list[int]], torch.Tensor]
    config: Any
    other: Any
    off: dict[str, float]
    always: bool

    @property
    def without(self) -> Any:
        """The settings with which it changes nothing."""
        return replace(self.config, **self.off)


def whole(reference: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a forward over a whole conversation, `(seq_len, vocab_size)`."""
    for module in reference.modules():
        if "rope_deltas" in vars(module):
            module.rope_deltas = None
    return logits(reference, in_double(inputs), use_cache=False)[0]


def savaa(tiny: TinyVLM, config: SAVAAConfig, inputs: dict[str, torch.Tensor], cuts: list[int]) -> torch.Tensor:
    """The loop of SAVAA."""
    model = tiny.build()
    layers = config.layers_to_transform or config.default_layers(SAVAAConfig.layers_on(find_vlm(model)))
    ids = inputs["input_ids"][0]
    visual = (ids == IMAGE) | (ids == VIDEO)
    rows: dict[int, tuple[float, int]] = {}  # of decoded tokens: the factor of visual keys, and the prompt's length

    def scale(tokens: Tokens, layer_idx: int) -> torch.Tensor:
        pairs = torch.ones(1, len(ids), len(ids), dtype=torch.float64)
        for row, (factor, prompt_length) in rows.items() if layer_idx in layers else ():
            pairs[0, row, :prompt_length] = 1 / config.text
            pairs[0, row, visual] = factor
        return pairs

    risk, prompt_length = None, 0
    with oracle(model, inputs, scale=scale) as reference:
        for start, stop in itertools.pairwise(cuts):
            if stop - start > 1 or risk is None:
                prompt_length = stop
            elif visual[:start].any():
                rows[start] = 1 + (config.visual - 1) * min(max(risk, 0.0), 1.0), prompt_length
            found = whole(reference, inputs)
            last = found[stop - 1].softmax(-1)
            entropy = -sum(p * math.log(p) for p in last.tolist() if p > 0) / math.log(len(last))
            of_images = found[:stop][visual[:stop]].softmax(-1)[:, last.argmax()].tolist()
            risk = (
                config.alpha * entropy + (1 - config.alpha) * (1 - max(of_images, default=0.0))
            ) / config.risk_scale
    return found


def sparc(tiny: TinyVLM, config: SPARCConfig, inputs: dict[str, torch.Tensor], cuts: list[int]) -> torch.Tensor:
    """The loop of SPARC."""
    model = tiny.build()
    vlm = find_vlm(model)
    layers = config.layers_to_transform or SPARCConfig.layers_on(vlm)
    chooses_by = config.fitted_to(vlm).choosing_layer
    ids = inputs["input_ids"][0]
    places = torch.nonzero((ids == IMAGE) | (ids == VIDEO)).flatten().tolist()
    rows: dict[int, dict[int, float]] = {}  # by row, of which visual tokens the weight is multiplied by what
    looks: dict[int, float] = {}  # by visual token, the weight that the last row of a piece has given it

    def weigh(tokens: Tokens, layer_idx: int, weights: torch.Tensor) -> torch.Tensor:
        if layer_idx == chooses_by:
            looks.update({place: float(weights[0, :, stop - 1, place].mean()) for place in places})
        factors = torch.ones_like(weights)
        for row, of_tokens in rows.items() if layer_idx in layers else ():
            for place, factor in of_tokens.items():
                factors[0, :, row, place] = factor
        return weights * factors

    average: dict[int, float] = {}
    count = dict.fromkeys(places, 0)
    with oracle(model, inputs, weigh=weigh) as reference:
        for start, stop in itertools.pairwise(cuts):
            for row in range(start, stop):
                if row not in places:
                    rows[row] = {place: config.alpha ** count[place] for place in places if place < row}
            found = whole(reference, inputs)
            for place in places:
                if place >= stop or stop - 1 in places:
                    continue
                seen, before = looks[place], average.get(place)
                if before is not None and seen > 0 and seen - before >= config.tau * before:
                    count[place] += 1
                average[place] = seen if before is None else config.beta * seen + (1 - config.beta) * before
    return found


STEPWISE = {
    "savaa": Stepwise(
        savaa,
        SAVAAConfig(visual=3.0, text=2.0, alpha=0.5, risk_scale=1.5),
        SAVAAConfig(visual=0.4, text=0.7, alpha=0.1, risk_scale=1.0, layers_to_transform=[1]),
        {"visual": 1.0, "text": 1.0},
        always=True,
    ),
    "sparc": Stepwise(
        sparc,
        SPARCConfig(alpha=3.0, tau=0.02, beta=0.6),
        SPARCConfig(alpha=0.3, tau=0.05, choosing_layer=1, layers_to_transform=[0, 2]),
        {"alpha": 1.0},
        always=False,
    ),
}


def in_pieces(tiny: TinyVLM, model: torch.nn.Module, chats: list[str], cuts: list[list[int]]) -> list[torch.Tensor]:
    """The logits of conversations that are read in turn, piece by piece, each on its own cache."""
    caches: list[Any] = [None] * len(chats)
    found: list[list[torch.Tensor]] = [[] for _ in chats]
    for number in range(len(cuts[0]) - 1):
        for chat, (text, ends) in enumerate(zip(chats, cuts)):
            piece = tiny.inputs(model, text, start=ends[number], stop=ends[number + 1])
            with torch.no_grad():
                output = model(**piece, **{CACHE: caches[chat]}, use_cache=True)
            caches[chat] = output[CACHE]
            found[chat].append(output.logits[0])
    return [torch.cat(pieces) for pieces in found]


def length_of(tiny: TinyVLM, model: torch.nn.Module, chat: str) -> int:
    return tiny.inputs(model, chat)["input_ids"].shape[1]


def with_answer(prompt: dict[str, torch.Tensor], answer: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of a forward over a prompt and its answer."""
    whole = {**prompt, "input_ids": torch.cat([prompt["input_ids"], answer[None]], 1)}
    if "target_sizes" in prompt:  # MiniCPM-V 4.7, which would ask for the types of tokens
        whole["position_ids"] = torch.arange(whole["input_ids"].shape[1])[None]
    for name in whole:
        if name in ("attention_mask", "image_embeds_position_mask") or name.endswith("token_type_ids"):
            of_text = int(name in ("attention_mask", "token_type_ids"))
            whole[name] = torch.nn.functional.pad(whole[name], (0, len(answer)), value=of_text)
    return whole


def steps(tiny: TinyVLM, model: torch.nn.Module, cache: Any, chat: str, start: int, number: int) -> torch.Tensor:
    """The logits of some tokens of a chat, decoded one by one on its cache."""
    found = []
    for place in range(start, start + number):
        piece = tiny.inputs(model.get_base_model(), chat, start=place, stop=place + 1)
        piece["attention_mask"] = piece["attention_mask"][:, : cache.get_seq_length() + 1]
        found.append(logits(model, piece, **{CACHE: cache}, use_cache=True))
    return torch.cat(found, 1)
