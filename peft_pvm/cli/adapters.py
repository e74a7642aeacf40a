"""`peft-pvm inspect`, `merge`, `convert`, `card`, `push` and others: adapters as files, and what works on what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .choices import Combination
from .options import AsJSON, finite_number, new_folder, separated, there


ADAPTER = typer.Argument(help="Folder or Hub id of an adapter.", callback=there("an adapter"))
Adapter = Annotated[str, ADAPTER]
Base = Annotated[str, typer.Argument(help="Folder or Hub id of the base model.", callback=there("a base model"))]


def inspect(
    adapter: Annotated[str | None, ADAPTER] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of a base model. With an adapter: does it fit? Alone: which methods work?",
            callback=there("a base model"),
        ),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Describe an adapter, and check whether it fits a base model; or list the methods that work on a base model.

    An adapter is shown with its method, sizes, layers, gates and lineage. Only the configuration of a base model is
    read.
    """
    if adapter is None and base is None:
        raise typer.BadParameter("Give an adapter, or a base model with --base.", param_hint=["--base"])
    from .work import adapters as work
    from .work.models import describe_base

    if adapter is not None:
        work.inspect(adapter, base, as_json)
    elif base is not None:
        describe_base(base, as_json)


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Folders or Hub ids of PVM adapters.", callback=there("an adapter")),
    ],
    out: Annotated[Path, typer.Option(callback=new_folder, help="Folder of the new adapter.")],
    weights: Annotated[
        str,
        typer.Option(help="One weight for each adapter: 0.7,0.3. By default, equal weights that add up to 1."),
    ] = "",
    combination_type: Annotated[Combination, typer.Option(help="How they are combined.")] = "linear",
    density: Annotated[
        float | None, typer.Option(min=0, max=1, help="For ties and dare_linear: the share of values to keep.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option(help="Average adapters even if they may not share their initial weights."),
    ] = False,
) -> None:
    """Combine several PVM adapters into one, without a base model."""
    if density is not None and combination_type not in ("ties", "dare_linear"):
        raise typer.BadParameter(f"{combination_type} keeps all, so it takes no density.", param_hint=["--density"])
    if force and combination_type == "cat":
        raise typer.BadParameter("cat does not average, so there is nothing to force.", param_hint=["--force"])
    numbers = [1 / len(adapters)] * len(adapters)
    if weights:
        numbers = separated("--weights", weights, finite_number, "numbers")
    from .work import adapters as work

    work.merge(adapters, numbers, out, combination_type=combination_type, density=density, force=force)


def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint of the authors' PVM code.")],
    out: Annotated[Path, typer.Argument(callback=new_folder, help="Folder for the adapter.")],
    with_base: Annotated[
        Path | None, typer.Option(callback=new_folder, help="Also write the model without the branch to this folder.")
    ] = None,
) -> None:
    """Convert a checkpoint of the PVM authors' code to an adapter."""
    from .work import adapters as work

    work.convert(source, out, with_base)


def export_reference(
    adapter: Adapter,
    base: Base,
    out: Annotated[Path, typer.Argument(callback=new_folder, help="Folder for the checkpoint.")],
) -> None:
    """Export an adapter and its base model as a checkpoint for the PVM authors' code."""
    from .work import adapters as work

    work.export_reference(adapter, base, out)


def export_vllm(
    base: Base,
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="Folders or Hub ids of adapters. Adapters joined by + are on at the same time.",
            callback=there("an adapter"),
        ),
    ],
    out: Annotated[Path, typer.Argument(callback=new_folder, help="Folder for the model.")],
    accept_causal: Annotated[
        bool,
        typer.Option(help="Export memory_visibility=sample too, though in vLLM a token sees only images before it."),
    ] = False,
    by_request: Annotated[
        bool, typer.Option(help="Let requests choose between a single adapter and the base.")
    ] = False,
) -> None:
    """Export a base model and adapters to a folder for `vllm serve`.

    A single adapter is on in every request. If there are several, each request chooses one by its name, or none.
    """
    from .work import adapters as work

    work.export_vllm(base, adapters, out, accept_causal, by_request)


def card(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of an adapter.")],
) -> None:
    """Write an adapter's model card again, with the results in its results.json."""
    from .work import adapters as work

    work.card(folder)


def push(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of an adapter.")],
    repo_id: Annotated[
        str, typer.Argument(help="Repository on the Hub, such as you/my-pvm. It is created if it does not exist.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Hub id of the base model, in place of the one that the adapter names.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch of the repository. It is created if it does not exist.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")] = False,
) -> None:
    """Upload an adapter to the Hub: its configuration, weights, card and results, and nothing else."""
    from .work import adapters as work

    work.push(folder, repo_id, base=base, revision=revision, private=private or None)


def models(
    name: Annotated[str | None, typer.Argument(help="A type, or a part of a model's name; by default all.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Show which models are tested, and what works on each."""
    from .work import models as work

    work.models(name, as_json)


def methods(as_json: AsJSON = False) -> None:
    """Show the methods: what each does, its parameters, and on how many types of models it works.

    With --json, also what each changes and on which attention kernels.
    """
    from .work import methods as work

    work.methods(as_json)
