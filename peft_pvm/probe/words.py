"""What a probe found, in words: the verdict on its page and on the terminal, and numbers that are easy to read."""

from __future__ import annotations

from collections.abc import Sequence

from ..utils.text import plain
from .findings import Findings, ForwardRecord


def verdict(result: Findings) -> list[str]:
    """How much the model looks at its image, and what its adapters change about that.

    Args:
        result: What `probe` found.

    Returns:
        A sentence each.
    """
    return [_looks(result), *_sinks(result), *_changes(result)]


def percent(share: float) -> str:
    """A share in a form that is easy to read.

    Example:
        >>> [percent(share) for share in (0.1139, 0.0418, 0.0004, 0.0, 1.0)]
        ['11 %', '4.2 %', '< 0.1 %', '0 %', '100 %']
    """
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{share:.0%}".replace("%", " %") if share == 0 or share >= 0.0995 else f"{100 * share:.1f} %"


def shown(token: str) -> str:
    """A generated token in a line of text, also if it is white space or nothing.

    Example:
        >>> [shown(token) for token in (" sign", "\\n", "")]
        ['sign', '\\\\n', "''"]
    """
    return plain(token, limit=40).strip() or repr(token)


def nats(divergences: Sequence[float]) -> str:
    """The mean of some divergences.

    Example:
        >>> nats([0.1, 0.14]), nats([0.0001])
        ('0.12 nats', '< 0.001 nats')
    """
    mean = sum(divergences) / len(divergences)
    return "< 0.001 nats" if 0 < mean < 0.001 else f"{mean:.2g} nats"


def share_changed(forward: ForwardRecord, base: ForwardRecord) -> float:
    """The share of tokens for which a forward would choose another than the base, on the same text."""
    pairs = list(zip(forward.choice_ids, base.choice_ids))
    return sum(chosen != of_base for chosen, of_base in pairs) / len(pairs)


def _looks(result: Findings) -> str:
    masses = result.base.mean_mass
    others = [f"with {forward.label} {percent(forward.mean_mass[-1])}" for forward in result.forwards[1:]]
    whose = "the base's attention" if others else "attention"
    said = f"{percent(masses[0])} of {whose} reaches the image at the first token"
    if len(masses) > 1:
        said += f", {percent(masses[-1])} at the last"
    return f"{said}; {', '.join(others)}." if others else f"{said}."


def _sinks(result: Findings) -> list[str]:
    if not any(layer.sinks for layer in result.base.attention):
        return []
    shares = result.base.mean_mass_without_sinks
    return [
        f"A few visual tokens draw attention whatever is asked. Without these sinks it is {percent(shares[0])} at the "
        f"first token and {percent(shares[-1])} at the last."
    ]


def _changes(result: Findings) -> list[str]:
    if len(result.forwards) == 1:
        return []
    first, *others = (
        (forward.label, percent(share_changed(forward, result.base)), nats(forward.kl_to_base))
        for forward in result.forwards[1:]
    )
    said = "Of the tokens, {} changes {} (mean KL {})".format(*first)
    return [", ".join([said, *("{} {} ({})".format(*other) for other in others)]) + "."]
